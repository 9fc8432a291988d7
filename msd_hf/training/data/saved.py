"""Data sets by their names: a folder that `datasets` has saved or can read, or a repository of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import MSDError, describe_error, is_about_input


_FILES = (".json", ".jsonl", ".txt")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # files of `save_to_disk`


def open_by_name(name: str | Path, split: str | None = None, subset: str | None = None) -> Any:
    """
    Opens a data set that `datasets` knows: a folder of `save_to_disk`, a folder of data files, or a data set of the
    Hub. Code from there is never run.

    Args:
        name: the folder, or the id on the Hub.
        split (*optional*): the split; by default `"train"`, or the only one.
        subset (*optional*): the subset (configuration) of a data set that has several.

    Returns:
        `datasets.Dataset`; `None` if the name is that of a file, there or not.

    Raises:
        MSDError: when it cannot be loaded, or has no such split.
    """
    path = Path(name)
    if not str(name).strip() or path.suffix in _FILES or (path.exists() and not path.is_dir()):
        return None
    if not path.exists() and not _REPOSITORY.fullmatch(str(name)):
        return None
    datasets = _datasets(name)
    try:
        if any((path / file).is_file() for file in _SAVED):
            return _choose_split(datasets.load_from_disk(str(path)), split, name)
        # Before release 4 a repository could bring code.
        safe = {"trust_remote_code": False} if int(datasets.__version__.partition(".")[0]) < 4 else {}
        if split is None:  # asked first, because loading a split that is not there would download all others
            split = _only_or_train(datasets.get_dataset_split_names(str(name), subset, **safe), name)
        return datasets.load_dataset(str(name), subset, split=split, **safe)
    except Exception as error:
        if isinstance(error, MSDError) or not is_about_input(error):
            raise
        what = "cannot be loaded" if path.exists() else "is no file, and cannot be loaded from the Hub"
        raise MSDError(f"The data {str(name)!r} {what}: {describe_error(error)}") from error


def folders_of(name: str | Path) -> tuple[Path, ...]:
    """The folders in which the images of a data set lie that was opened by its name: its own, and the caches of the
    Hub. Who made the data set could name any other file in it."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return tuple(Path(folder).resolve() for folder in (name, HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE))


def _choose_split(found: Any, split: str | None, name: str | Path) -> Any:
    if not isinstance(found, Mapping):
        if split is not None:
            raise MSDError(f"The data {str(name)!r} is one saved split: leave the split {split!r} out.")
        return found
    if split is None:
        split = _only_or_train(found, name)
    if split not in found:
        raise _other_split(found, name)
    return found[split]


def _only_or_train(splits: Iterable[str], name: str | Path) -> str:
    splits = list(splits)
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise _other_split(splits, name)


def _other_split(splits: Iterable[str], name: str | Path) -> MSDError:
    return MSDError(f"The data {str(name)!r} has the splits {', '.join(splits)}: choose one of them.")


def _datasets(name: str | Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MSDError(
            f"The data {str(name)!r} is no file, and data sets need the package datasets: pip install datasets"
        ) from error
    return datasets


__all__ = ["folders_of", "open_by_name"]
