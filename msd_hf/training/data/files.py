"""Files of raw samples: `.json` holds a list, `.jsonl` one sample a line, `.txt` one prompt a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import MSDError
from .vqa import questions_of


def read_samples(path: Path, needs_answer: bool = True) -> tuple[list[Any], str]:
    """
    Reads all samples of a file.

    Args:
        path: the file.
        needs_answer: whether all samples must be objects. If not, they may be texts, a `.txt` file holds a prompt a
            line, and a `.json` file may be of the form of VQA, see [`questions_of`].

    Returns:
        The samples, and the sha256 of the file.

    Raises:
        MSDError: when the file cannot be read, is not JSON, or holds something else than objects. The message names
            the line.
    """
    content = _read(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MSDError(
            f"The data {str(path)!r} is not UTF-8: line {line} holds the byte {content[error.start]:#04x}."
        ) from error
    kinds = (dict,) if needs_answer else (dict, str)
    if path.suffix == ".txt" and not needs_answer:
        samples: list[Any] = [line.strip() for _, line in _lines(text)]
    elif path.suffix == ".jsonl":
        samples = _parse_lines(text, path, kinds)
    else:
        parsed = _parse(text, path)
        samples = _checked_list(parsed if needs_answer else questions_of(parsed), path, kinds)
    return samples, hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or a device may never end
            raise MSDError(f"The data {str(path)!r} cannot be read: it is not a regular file.")
        return path.read_bytes()
    except OSError as error:
        raise MSDError(f"The data {str(path)!r} cannot be read: {error.strerror}.") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    # Not `splitlines`, which also splits at the other line separators of Unicode that a text may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _parse_lines(text: str, path: Path, kinds: tuple[type, ...]) -> list[Any]:
    return [
        _checked(_parse(line, path, first_line=number), path, f"line {number}", kinds) for number, line in _lines(text)
    ]


def _checked_list(samples: Any, path: Path, kinds: tuple[type, ...]) -> list[Any]:
    if not isinstance(samples, list):
        wanted = "a list of objects" + ("" if kinds == (dict,) else " or texts, or one under `questions`")
        raise MSDError(f"The data {str(path)!r} must hold {wanted}, not a {type(samples).__name__}.")
    return [_checked(sample, path, f"element {number}", kinds) for number, sample in enumerate(samples, 1)]


def _parse(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place, problem = f"line {first_line}", str(error)
        if isinstance(error, json.JSONDecodeError):
            place, problem = f"line {first_line + error.lineno - 1}, column {error.colno}", error.msg
        advice = "" if path.suffix in (".json", ".jsonl") else " Name it .json (a list) or .jsonl (one sample a line)."
        raise MSDError(f"The data {str(path)!r} is not valid JSON ({place}): {problem}.{advice}") from error


def _checked(sample: Any, path: Path, place: str, kinds: tuple[type, ...]) -> Any:
    if not isinstance(sample, kinds):
        raise MSDError(
            f"The data {str(path)!r} must hold a list of objects, one for each conversation, but {place} is a "
            f"{type(sample).__name__}."
        )
    return sample


__all__ = ["read_samples"]
