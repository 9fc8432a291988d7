"""From a prompt and an image to the inputs of a target, with the target's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, PreTrainedModel

from .errors import MSDError, is_about_input


if TYPE_CHECKING:
    from PIL.Image import Image


def build_inputs(processor: Any, prompt: str, image: Image | None = None) -> BatchFeature:
    """
    Makes the inputs of a target for one user turn, in the processor's own chat template.

    Args:
        processor (`ProcessorMixin`): the target's processor.
        prompt: the question.
        image (*optional*): an image, which comes before the question.

    Raises:
        MSDError: when the processor has no chat template, the template fails, or a text is not valid Unicode.
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
        MSDError: when the processor has no chat template, the template fails, or a text is not valid Unicode.
    """
    check_chat_template(processor)
    for text in (part["text"] for message in messages for part in message["content"] if part["type"] == "text"):
        if not is_unicode(text):
            raise MSDError(f"The text {text[:80]!r} is not valid Unicode.")
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program, which can fail in any way
        if not is_about_input(error):
            raise
        raise MSDError(f"The target's chat template fails ({type(error).__name__}): {error}") from error
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


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, as bytes of a command line that are not UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    "is_unicode",
    "move_inputs",
]
