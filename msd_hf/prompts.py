"""From a prompt and an image file to the inputs of a target, with the target's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, PreTrainedModel

from .errors import MSDError


if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: str | Path) -> Image:
    """
    Reads an image file completely, as RGB.

    Raises:
        MSDError: when the file is missing, is not an image, or is damaged.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MSDError('Reading images needs Pillow: pip install "msd-hf[images]".') from error
    path = Path(path)
    if not path.is_file():
        raise MSDError(f"There is no image file {str(path)!r}.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise MSDError(f"{str(path)!r} is not an image that Pillow can read.") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for truncated or broken files
        raise MSDError(f"The image {str(path)!r} is damaged: {error}.") from error


def build_inputs(processor: Any, prompt: str, image: Image | None = None) -> BatchFeature:
    """
    Makes the inputs of a target for one user turn, in the processor's own chat template.

    Args:
        processor (`ProcessorMixin`): the target's processor.
        prompt: the question.
        image (*optional*): an image, which comes before the question.

    Raises:
        MSDError: when the processor has no chat template.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        content.insert(0, {"type": "image"})
    return build_chat_inputs(processor, [{"role": "user", "content": content}], [] if image is None else [image])


def build_chat_inputs(processor: Any, messages: list[dict[str, Any]], images: Sequence[Image] = ()) -> BatchFeature:
    """
    Makes the inputs of a target for the next answer of a chat.

    Args:
        processor (`ProcessorMixin` or tokenizer): the target's processor.
        messages: chat messages. The last message is the user's.
        images: one image for each image part of the messages.

    Raises:
        MSDError: when the processor has no chat template.
    """
    check_chat_template(processor)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    arguments: dict[str, Any] = {"images": list(images)} if images else {}
    arguments["add_special_tokens"] = adds_special_tokens(getattr(processor, "tokenizer", processor), text)
    return processor(text=[text], return_tensors="pt", **arguments)


def check_chat_template(processor: Any) -> None:
    """
    Checks that a processor has a chat template.

    Raises:
        MSDError: when it has none.
    """
    if getattr(processor, "chat_template", None) is None:
        raise MSDError(f"The target's processor (`{type(processor).__name__}`) has no chat template.")


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer should add special tokens to a rendered chat."""
    # Many chat templates write the start token themselves; a tokenizer that adds another one would give two.
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def move_inputs(inputs: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Moves inputs to the model's device, and casts floating-point inputs (images) to its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


__all__ = [
    "adds_special_tokens",
    "build_chat_inputs",
    "build_inputs",
    "check_chat_template",
    "move_inputs",
    "read_image",
]
