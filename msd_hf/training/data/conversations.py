"""Conversations to train on: LLaVA and ShareGPT files, and data sets of chat messages, read lazily."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import MSDError, errors_name_sample, is_about_input
from ...terminal import printable
from .conversation import REASONS, Conversation, count_images
from .files import read_samples
from .joined import JoinedConversations
from .reading import SampleReader
from .saved import folders_of, open_by_name
from .streamed import StreamedConversations
from .turns import QUESTION_COLUMNS, TURN_COLUMNS, has_turns


class Conversations:
    """
    A map-style data set of [`Conversation`]s. A sample is parsed when it is indexed, and images are not opened.

    Args:
        samples (sequence of `dict`): raw samples.
        name: name of the data in messages.
        image_folder (*optional*): the folder that holds all images and that image paths are relative to.
        fingerprint (*optional*): identifies the content of the data. By default it is computed at its first use.
        stored_in: folders from which images may be read that are stored by their path, see [`SampleReader`].
        needs_answer: whether a sample without an answer is broken.
    """

    def __init__(
        self,
        samples: Any,
        name: str,
        image_folder: Path | None = None,
        fingerprint: str | None = None,
        stored_in: tuple[Path, ...] | None = (),
        needs_answer: bool = True,
    ):
        self.name = name
        self._samples = samples
        self.image_folder = None if image_folder is None else image_folder.resolve()
        self._read = SampleReader(self.image_folder, stored_in, needs_answer)
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
            return _content_of(self._samples[index])
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
        return self._read(sample, index)


def load_conversations(
    data: Any,
    image_folder: str | Path | None = None,
    *,
    split: str | None = None,
    subset: str | None = None,
    weights: Sequence[float] | None = None,
    needs_answer: bool = True,
) -> Any:
    """
    Opens conversations to train on. Each sample is checked when it is indexed.

    A sample has one of these forms: `conversations` (turns with `from` and `value`, as in LLaVA and ShareGPT);
    `messages` (turns with `role` and `content`); `prompt` and `completion` (turns, or a text each), as in trl. It may
    have `image` or `images`: a path, a PIL image or `{"bytes", "path"}`, or a list of these. The tag `<image>` in a
    text, or an image part, marks the place of an image; without any mark, images of `messages` and of a `prompt` come
    first in the first turn of the user.

    Args:
        data: a `.json` file that holds a list, or a `.jsonl` file; a folder of `Dataset.save_to_disk`, a folder of
            data files or an id of the Hub, for `datasets`; a `datasets.Dataset` or `IterableDataset`; samples in
            memory; or a list of several of these.
        image_folder (*optional*): folder that image paths are relative to; all images must be in it. By default the
            folder of the file. Paths in an `Image` column of `datasets` need none.
        split, subset (*optional*): split and subset of a data set that is given by its name; by default `"train"`.
        weights (*optional*): for several data sets, the share of each in a pass, see [`JoinedConversations`].
        needs_answer: `False` if only the prompts are used. Samples may then lack an answer, be a text, or have the
            question under `question`, `prompt`, `text`, `query`, `instruction` or `turns` (of which the first is
            taken), with its pictures before it if no `<image>` marks their places. Files may also be `.txt` files with
            a prompt a line, and `.json` files in the form of VQA (`{"questions": [...]}`).

    Returns:
        [`Conversations`], [`JoinedConversations`] for several data sets, or [`StreamedConversations`] for a stream,
        which has no length.

    Raises:
        MSDError: when the data as a whole cannot be read.
    """
    folder = None if image_folder is None else Path(image_folder).resolve()
    if folder is not None and not folder.is_dir():
        raise MSDError(f"There is no image folder {str(folder)!r}.")
    if is_opened(data):
        return data
    if isinstance(data, (list, tuple)) and data and all(map(_is_whole, data)):
        given: dict[str, Any] = {"split": split, "subset": subset, "needs_answer": needs_answer}
        parts = [load_conversations(part, folder, **given) for part in data]
        return parts[0] if len(parts) == 1 else JoinedConversations(parts, weights)  # one has the whole share
    if weights is not None:
        raise MSDError("`weights` are for a list of several data sets.")
    if isinstance(data, (str, Path)):
        opened = open_by_name(data, split, subset)
        if opened is None:
            _check_no_split(split, subset)
            path = Path(data)
            samples, fingerprint = read_samples(path, needs_answer)
            name = printable(path.name)
            return Conversations(samples, name, folder or path.parent, fingerprint, needs_answer=needs_answer)
        return _open_data_set(opened, folder, folders_of(data), needs_answer)
    _check_no_split(split, subset)
    if isinstance(data, Mapping):
        raise MSDError(f"The data is a mapping with the keys {list(data)[:5]}: choose one split of it.")
    if _is_data_set(data):
        return _open_data_set(data, folder, None, needs_answer)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Conversations(data, f"{type(data).__name__} of {len(data)}", folder, needs_answer=needs_answer)
    if hasattr(data, "__iter__") and not hasattr(data, "__next__"):
        reader = SampleReader(folder, needs_answer=needs_answer)
        return StreamedConversations(data, type(data).__name__, reader, _identify)
    raise MSDError(
        f"A `{type(data).__name__}` cannot be read from its beginning twice: give a file, a `datasets.Dataset` or "
        "`IterableDataset`, or a list of dicts."
    )


def _check_no_split(split: str | None, subset: str | None) -> None:
    if split is not None or subset is not None:
        raise MSDError("`split` and `subset` are for a saved data set or one of the Hub, given by its name.")


def is_opened(data: Any) -> bool:
    """Whether data is what [`load_conversations`] returns."""
    return isinstance(data, (Conversations, JoinedConversations, StreamedConversations))


def _is_whole(part: Any) -> bool:
    """Whether an element of a list is a data set and not a sample."""
    return isinstance(part, (str, Path)) or _is_data_set(part) or is_opened(part)


def _is_data_set(data: Any) -> bool:
    """Whether data is a `datasets.Dataset` or a `datasets.IterableDataset`."""
    return hasattr(data, "with_format") and hasattr(data, "features")


def _open_data_set(data: Any, folder: Path | None, images: tuple[Path, ...] | None, needs_answer: bool) -> Any:
    """Opens a data set of `datasets`. Images that are stored by their path may lie in the folders `images`."""
    name = getattr(data.info, "dataset_name", None) or "dataset"
    features = data.features or {}
    has_images = any(_holds_images(feature) for feature in features.values())
    stored_in = images if has_images else ()
    if not hasattr(data, "__len__"):
        _check_columns(name, data.column_names, needs_answer)
        stream = data.decode(False) if has_images else data  # an image that cannot be decoded would end the stream
        return StreamedConversations(stream, name, SampleReader(folder, stored_in, needs_answer), _identify)
    if data.format["type"] == "custom":  # a transform of the user makes the samples
        return Conversations(data, name, folder, data._fingerprint, stored_in, needs_answer)
    _check_columns(name, data.column_names, needs_answer)
    return Conversations(_Undecoded(data), name, folder, data._fingerprint, stored_in, needs_answer)


def _check_columns(name: str, columns: Sequence[str] | None, needs_answer: bool) -> None:
    if columns and not has_turns(columns, needs_answer):
        needed = f"training needs {TURN_COLUMNS}" if needs_answer else f"prompts need {QUESTION_COLUMNS}"
        raise MSDError(f"{name} has the columns {', '.join(columns)}, and {needed}.")


def _holds_images(feature: Any) -> bool:
    """Whether a feature of `datasets` is an image, or holds images."""
    if isinstance(feature, Mapping):
        return any(map(_holds_images, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_holds_images, feature))
    if type(feature).__name__ == "Image":
        return True
    return hasattr(feature, "feature") and _holds_images(feature.feature)


class _Undecoded:
    """Rows of a `datasets.Dataset` whose images stay bytes: the data set itself would decode all images of a row."""

    def __init__(self, dataset: Any):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index : index + 1].to_pylist()[0]


def _identify(samples: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(_content_of(sample).encode() + b"\n")
    return digest.hexdigest()


def _content_of(sample: Any) -> str:
    return json.dumps(sample, sort_keys=True, default=_describe)


def _describe(value: Any) -> Any:
    """Converts a value that JSON cannot hold, for the fingerprint."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return [value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value) if isinstance(value, Path) else f"<{type(value).__name__}>"


__all__ = [
    "REASONS",
    "Conversation",
    "Conversations",
    "JoinedConversations",
    "StreamedConversations",
    "count_images",
    "is_opened",
    "load_conversations",
]
