"""Conversations to train on: LLaVA and ShareGPT files, and data sets of chat messages, read lazily."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MSDDataError, MSDError, errors_name_sample, is_about_input
from ...images import open_image, to_rgb
from ...terminal import printable
from .files import read_samples
from .turns import read_messages


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


class Conversations:
    """
    A map-style data set of [`Conversation`]s. A sample is parsed when it is indexed, and images are not opened.

    Args:
        samples (sequence of `dict`): raw samples.
        name: name of the data in messages.
        image_folder (*optional*): the folder that holds all images and that image paths are relative to.
        fingerprint (*optional*): identifies the content of the data. By default it is computed at its first use.
    """

    def __init__(self, samples: Any, name: str, image_folder: Path | None = None, fingerprint: str | None = None):
        self.name = name
        self._samples = samples
        self.image_folder = None if image_folder is None else image_folder.resolve()
        if fingerprint is not None:
            self.__dict__["fingerprint"] = fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the raw samples. The content of image files is not part of it."""
        digest = hashlib.sha256()
        for index in range(len(self._samples)):
            digest.update(self._content(index).encode() + b"\n")
        return digest.hexdigest()

    def _content(self, index: int) -> str:
        """The content of a raw sample, for the fingerprint. A sample that cannot be read stands for itself by its
        error; it is skipped when the data is used."""
        try:
            return json.dumps(self._samples[index], sort_keys=True, default=_describe)
        except Exception as error:
            if not is_about_input(error):
                raise
            return type(error).__name__

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Conversation:
        """
        Parses one sample.

        Raises:
            MSDDataError: when the sample is broken; its `reason` is one of `REASONS`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, but number {index} was asked for.")
        index %= len(self)
        with errors_name_sample(str(index)):
            sample = self._samples[index]
            if not isinstance(sample, Mapping):
                raise MSDDataError("no conversation", f"is a {type(sample).__name__}, not an object.")
            sample_id = _label(index if sample.get("id") is None else sample["id"])
        with errors_name_sample(sample_id):
            messages, references = read_messages(sample)
            images = tuple(self._locate(reference) for reference in references)
        return Conversation(sample_id, messages, images, complete=sample.get("complete") is not False)

    def _locate(self, reference: Any) -> Path | Image:
        if isinstance(reference, Mapping):  # `datasets` stores images like this
            if reference.get("bytes"):
                return _decode(reference["bytes"], str(reference.get("path") or "an image in the data"))
            reference = reference.get("path")
        if hasattr(reference, "convert"):  # a PIL image
            return reference
        if not isinstance(reference, (str, Path)) or not str(reference):
            raise MSDDataError("broken image", f"an image is {reference!r}, not a path or a picture.")
        if self.image_folder is None:
            raise MSDDataError("missing image", f"names the file {str(reference)!r}, but there is no image folder.")
        try:
            path = (self.image_folder / reference).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a null byte
            raise MSDDataError("missing image", f"{str(reference)!r} is no path: {error}.") from error
        if not path.is_relative_to(self.image_folder):
            raise MSDDataError(
                "image outside folder",
                f"{str(reference)!r} is not inside the image folder {str(self.image_folder)!r}.",
            )
        return path


def load_conversations(data: Any, image_folder: str | Path | None = None) -> Conversations:
    """
    Opens conversations to train on. Each sample is checked when it is indexed.

    Args:
        data (`str`, `Path`, `datasets.Dataset` or sequence of `dict`): a `.json` file that holds a list, a `.jsonl`
            file, or samples in memory. Each sample has `conversations` (turns with `from` and `value`, as in LLaVA and
            ShareGPT) or `messages` (turns with `role` and `content`), and optionally `image` or `images`: a path, a
            PIL image or `{"bytes", "path"}`, or a list of these. The tag `<image>` in a text, or an image part, marks
            the place of an image.
        image_folder (*optional*): folder that image paths are relative to; all images must be in it. By default the
            folder of the file.

    Raises:
        MSDError: when the data as a whole cannot be read.
    """
    folder = None if image_folder is None else Path(image_folder)
    if folder is not None and not folder.is_dir():
        raise MSDError(f"There is no image folder {str(folder)!r}.")
    if isinstance(data, (str, Path)):
        path = Path(data)
        samples, fingerprint = read_samples(path)
        return Conversations(samples, printable(path.name), folder or path.parent, fingerprint)
    if isinstance(data, Mapping):
        raise MSDError(f"The data is a mapping with the keys {list(data)[:5]}: choose one split of it.")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise MSDError(
            f"A `{type(data).__name__}` has no length: give a file, a `datasets.Dataset` or a list of dicts."
        )
    if hasattr(data, "with_format") and hasattr(data, "features"):
        name = getattr(data.info, "dataset_name", None) or "dataset"
        own = data.format["type"] == "custom"  # a transform of the user makes the samples
        return Conversations(data if own else _Undecoded(data), name, folder, data._fingerprint)
    return Conversations(data, f"{type(data).__name__} of {len(data)}", folder)


class _Undecoded:
    """Rows of a `datasets.Dataset` whose images stay bytes: the data set itself would decode all images of a row."""

    def __init__(self, dataset: Any):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index : index + 1].to_pylist()[0]


def _label(sample_id: Any) -> str:
    """The id of a sample as a text of moderate length that every file can hold."""
    text = str(sample_id).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 256 else f"{text[:253]}..."


def _open_image(image: Path | Image, sample_id: str) -> Image:
    with errors_name_sample(sample_id):
        if isinstance(image, Path):
            if not os.path.isfile(image):  # `Path.is_file` raises for a name that is too long
                raise MSDDataError("missing image", f"there is no file {str(image)!r}.")
            with _decode(image, str(image)) as opened:
                return _to_rgb(opened, str(image))
        return _to_rgb(image, "an image")


def _decode(source: Path | bytes, name: str) -> Image:
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


def _describe(value: Any) -> Any:
    """Converts a value that JSON cannot hold, for the fingerprint."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return [value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value) if isinstance(value, Path) else f"<{type(value).__name__}>"


__all__ = ["REASONS", "Conversation", "Conversations", "count_images", "load_conversations"]
