"""From a prompt and an image file to the inputs of a target, by the target's own processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature

from .errors import MSDError


if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: str | Path) -> Image:
    """
    Reads an image file completely, as RGB.

    Raises:
        MSDError: when the file is missing, or is not an image, or is damaged.
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
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated or broken files
        raise MSDError(f"The image {str(path)!r} is damaged: {error}.") from error


def build_inputs(processor: Any, prompt: str, image: Image | None = None) -> BatchFeature:
    """
    The inputs of a target for one user turn, in the processor's own chat template.

    Args:
        processor (`ProcessorMixin`): the target's.
        prompt (`str`): the question.
        image (`PIL.Image.Image`, *optional*): comes before the question.

    Raises:
        MSDError: when the processor has no chat template.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None:
        content.insert(0, {"type": "image"})
    return build_chat_inputs(processor, [{"role": "user", "content": content}], [] if image is None else [image])


def build_chat_inputs(processor: Any, messages: list[dict[str, Any]], images: Sequence[Image] = ()) -> BatchFeature:
    """
    The inputs of a target for the next answer of a chat.

    Args:
        processor (`ProcessorMixin` or tokenizer): the target's.
        messages (`list[dict]`): chat messages, of which the last one is the user's.
        images (`Sequence[PIL.Image.Image]`): one for each image part of the messages.

    Raises:
        MSDError: when the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise MSDError(f"The target's processor (`{type(processor).__name__}`) has no chat template.")
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template writes the start token itself; a tokenizer that adds one would give two.
    bos_token = getattr(processor, "tokenizer", processor).bos_token
    add_special_tokens = not (bos_token and text.startswith(bos_token))
    arguments: dict[str, Any] = {"images": list(images)} if images else {}
    return processor(text=[text], return_tensors="pt", add_special_tokens=add_special_tokens, **arguments)


__all__ = ["build_chat_inputs", "build_inputs", "read_image"]
