"""One conversation to train on, whatever form its data has, and the reading of its images."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MSDDataError, MSDError, errors_name_sample, is_about_input
from ...images import open_image, to_rgb


if TYPE_CHECKING:
    from PIL.Image import Image

# The `reason` of each `MSDDataError` is one of these. Reports count skipped samples by reason.
REASONS = (
    "no conversation",
    "malformed turn",
    "unknown role",
    "misplaced system turn",
    "empty turn",
    "no assistant turn",
    "image count",
    "image in answer",
    "image outside folder",
    "missing image",
    "broken image",
    "image for a text-only target",
    "special token in text",
    "refused by chat template",
    "refused by processor",
    "tokenization",
    "too long",
    "non-finite features",
    "unexpected error",
)


@dataclass(frozen=True)
class Conversation:
    """
    One conversation, in the same form for all formats of data.

    Args:
        id: the `id` of the sample in the data, or its index.
        messages: chat messages, `{"role": "system" | "user" | "assistant", "content": [...]}` with the parts
            `{"type": "image"}` and `{"type": "text", "text": ...}`. User and assistant take turns after an optional
            system message. The content of an assistant's message is one text.
        images: one image for each image part, in that order.
        complete: `False` if a length limit cut the last answer, whose end must then not be learnt.
    """

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Path | Image, ...] = ()
    complete: bool = True

    def open_images(self) -> list[Image]:
        """
        Reads the images completely, as RGB.

        Raises:
            MSDDataError: when a file is missing or is not an image that can be read.
        """
        return [_open_image(image, self.id) for image in self.images]

    def first_prompt(self) -> tuple[list[dict[str, Any]], list[Image]]:
        """
        The messages before the first answer, and their images, opened.

        Raises:
            MSDDataError: when any image of the conversation is missing or cannot be read.
        """
        messages = list(itertools.takewhile(lambda message: message["role"] != "assistant", self.messages))
        return messages, self.open_images()[: count_images(messages)]


def count_images(messages: Iterable[Mapping[str, Any]]) -> int:
    """Number of image parts in chat messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _open_image(image: Path | Image, sample_id: str) -> Image:
    with errors_name_sample(sample_id):
        if isinstance(image, Path):
            if not os.path.isfile(image):  # `Path.is_file` raises for a name that is too long
                raise MSDDataError("missing image", f"there is no file {str(image)!r}.")
            with decode_image(image, str(image)) as opened:
                return _to_rgb(opened, str(image))
        return _to_rgb(image, "an image")


def decode_image(source: Path | bytes, name: str) -> Image:
    """
    Opens an image.

    Raises:
        MSDDataError: when it is not an image that Pillow reads.
    """
    try:
        return open_image(source if isinstance(source, Path) else BytesIO(source))
    except Exception as error:
        if isinstance(error, MSDError) or not is_about_input(error):
            raise
        raise MSDDataError(
            "broken image", f"{name!r} is not an image that Pillow reads ({type(error).__name__})."
        ) from error


def _to_rgb(image: Image, name: str) -> Image:
    try:
        return to_rgb(image)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        if not is_about_input(error):
            raise
        raise MSDDataError("broken image", f"{name!r} cannot be used: {error}.") from error


__all__ = ["REASONS", "Conversation", "count_images", "decode_image"]
