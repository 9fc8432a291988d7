"""Finds and reads the files of a checkpoint. What is wrong with a file becomes an error that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import cached_file

from ..errors import MSDCheckpointError


MAX_JSON_BYTES = 2**24  # the index of the largest published models has a few MB
_MAX_REASON = 300  # characters

# Arguments of `from_pretrained` that say where the files of a checkpoint are.
LOCATION_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def location_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the files of a checkpoint are."""
    return {name: kwargs[name] for name in LOCATION_ARGUMENTS if kwargs.get(name) is not None}


def local_folder(name_or_path: str | Path, location: Mapping[str, Any]) -> Path | None:
    """The folder of a checkpoint on this machine; `None` if the checkpoint is on the Hub."""
    folder = Path(name_or_path)
    return folder / location.get("subfolder", "") if folder.is_dir() else None


def find_file(name_or_path: str | Path, filename: str, location: Mapping[str, Any]) -> Path | None:
    """
    The path of a file of a checkpoint, which is downloaded if the checkpoint is on the Hub.

    Args:
        name_or_path: folder, or repository id.
        filename: name of the file in the folder.
        location: arguments of `from_pretrained`, see [`location_of`].

    Returns:
        The path, or `None` if the checkpoint has no such file.

    Raises:
        MSDCheckpointError: when the folder holds something else of this name.
        OSError: when there is no such checkpoint.
    """
    folder = local_folder(name_or_path, location)
    if folder is not None:
        if not os.path.lexists(folder / filename):
            return None
        check_regular(folder / filename)
        return folder / filename
    may_be_missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo")}
    found = cached_file(str(name_or_path), filename, **location, **may_be_missing)
    return None if found is None else Path(found)


def require_file(name_or_path: str | Path, filename: str, location: Mapping[str, Any]) -> Path:
    """[`find_file`], with an `OSError` if the checkpoint has no such file."""
    path = find_file(name_or_path, filename, location)
    if path is None:
        # The error of transformers says whether the file, the checkpoint or the network is missing.
        cached_file(str(name_or_path), filename, **location)
        raise OSError(f"{str(name_or_path)!r} has no file {filename!r}.")
    return path


def check_regular(path: Path) -> None:
    """
    Refuses what is not a file: a folder, a pipe that would never end, a link that leads nowhere.

    Raises:
        MSDCheckpointError: says what the path is.
    """
    if path.is_file():
        return
    kind = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no regular file"
    if not path.exists() and not path.is_symlink():
        kind = "missing"
    raise MSDCheckpointError(f"{str(path)!r} is {kind}, expected a file.")


@contextmanager
def errors_name_file(path: str | Path, expected: str) -> Iterator[None]:
    """
    Every error inside the block becomes an [`MSDCheckpointError`] that names the file. The block must depend on the
    file alone. Missing packages are not the fault of a file.

    Args:
        path: the file that the block reads.
        expected: what the file should be, for example "the configuration of a draft".
    """
    try:
        yield
    except (MSDCheckpointError, ImportError):
        raise
    except Exception as error:
        raise MSDCheckpointError(f"{str(path)!r} is not {expected}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One sentence that says what an error is about."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        text = str(error.__cause__)
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, RecursionError):
        text = "it is nested too deeply"
    elif isinstance(error, ValueError) and str(error):  # these sentences are made for users
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    text = text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."
    return text if text.endswith((".", "...")) else text + "."


def read_json(path: str | Path) -> dict[str, Any]:
    """
    Reads a JSON file that holds one object.

    Raises:
        MSDCheckpointError: when the file cannot be read, is too large, is not UTF-8, is not JSON, holds something
            else than an object, or names a field twice.
    """
    path = Path(path)
    check_regular(path)
    with errors_name_file(path, "a JSON file"):
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}.")
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_with_each_field_once)
    if not isinstance(value, dict):
        raise MSDCheckpointError(f"{str(path)!r} holds a JSON {_JSON_NAMES[type(value)]}, expected an object.")
    return value


_JSON_NAMES: dict[type, str] = {
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _with_each_field_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else ["a field"]
        raise ValueError(f"it names {', '.join(map(repr, repeated))} more than once.")
    return fields


__all__ = [
    "LOCATION_ARGUMENTS",
    "check_regular",
    "errors_name_file",
    "find_file",
    "local_folder",
    "location_of",
    "read_json",
    "require_file",
]
