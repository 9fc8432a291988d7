"""Reads one raw sample: its turns, and where its images are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MSDDataError, errors_name_sample, is_about_input, shown
from .conversation import Conversation, decode_image
from .turns import read_messages


if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SampleReader:
    """
    Makes [`Conversation`]s of raw samples. Images are located and not opened.

    Args:
        image_folder (*optional*): the folder that holds all images and that image paths are relative to.
        stored_in: the folders from which a stored image (`{"bytes", "path"}`) without bytes may be read by its path;
            `None`: from anywhere, as `datasets` does for its `Image` columns: files, archives and addresses.
        needs_answer: whether a sample without an answer is broken. If not, a text alone is a sample too.
    """

    image_folder: Path | None = None
    stored_in: tuple[Path, ...] | None = ()
    needs_answer: bool = True

    def __call__(self, sample: Any, index: int) -> Conversation:
        """
        Reads a sample.

        Args:
            sample: the raw sample.
            index: its number in the data, which names it if it has neither `id` nor `question_id`.

        Raises:
            MSDDataError: when the sample is broken; its `reason` is one of `REASONS`.
        """
        with errors_name_sample(str(index)):
            if isinstance(sample, str) and not self.needs_answer:
                sample = {"prompt": sample}
            if not isinstance(sample, Mapping):
                raise MSDDataError("no conversation", f"is a {type(sample).__name__}, not an object.")
            names = (sample.get("id"), sample.get("question_id"), index)
            sample_id = _label(next(name for name in names if name is not None))
        with errors_name_sample(sample_id):
            messages, references = read_messages(sample, self.needs_answer)
            images = tuple(self._locate(reference) for reference in references)
        return Conversation(sample_id, messages, images, complete=sample.get("complete") is not False)

    def _locate(self, reference: Any) -> Path | Image:
        if isinstance(reference, Mapping):  # `datasets` stores images like this
            if reference.get("bytes"):
                return decode_image(reference["bytes"], str(reference.get("path") or "an image in the data"))
            if self.stored_in != () and self.image_folder is None and reference.get("path"):
                return _stored_image(reference, self.stored_in)
            reference = reference.get("path")
        if hasattr(reference, "convert"):  # a PIL image
            return reference
        if not isinstance(reference, (str, Path)) or not str(reference):
            raise MSDDataError("broken image", f"an image is {shown(reference)}, not a path or a picture.")
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


def _stored_image(reference: Mapping[str, Any], folders: tuple[Path, ...] | None) -> Path | Image:
    """The image of an `Image` column that is stored by its path, in one of the folders."""
    path = str(reference["path"])
    if os.path.isfile(path):
        found = Path(path).resolve()
        if folders is None or any(found.is_relative_to(folder) for folder in folders):
            return found
    if folders is not None:
        raise MSDDataError(
            "image outside folder" if os.path.isfile(path) else "missing image",
            f"{shown(path, most=300)} is no file of this data set.",
        )
    import datasets

    try:  # an address in an archive or on the network
        return datasets.Image().decode_example(dict(reference))
    except Exception as error:
        if not is_about_input(error):
            raise
        raise MSDDataError(
            "missing image", f"{shown(path, most=300)} cannot be read ({type(error).__name__})."
        ) from error


def _label(sample_id: Any) -> str:
    """The id of a sample as a text of moderate length that every file can hold."""
    text = str(sample_id).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 256 else f"{text[:253]}..."


__all__ = ["SampleReader"]
