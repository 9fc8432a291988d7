"""Files of raw samples: a `.json` file holds a list, a `.jsonl` file one sample a line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ...errors import MSDError


def read_samples(path: Path) -> tuple[list[dict[str, Any]], str]:
    """
    Reads all samples of a file.

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
    samples = _parse_lines(text, path) if path.suffix == ".jsonl" else _parse_list(text, path)
    return samples, hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or a device may never end
            raise MSDError(f"The data {str(path)!r} cannot be read: it is not a regular file.")
        return path.read_bytes()
    except OSError as error:
        raise MSDError(f"The data {str(path)!r} cannot be read: {error.strerror}.") from error


def _parse_lines(text: str, path: Path) -> list[dict[str, Any]]:
    samples = []
    # Not `splitlines`, which also splits at the other line separators of Unicode that a text may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            samples.append(_object(_parse(line, path, first_line=number), path, f"line {number}"))
    return samples


def _parse_list(text: str, path: Path) -> list[dict[str, Any]]:
    samples = _parse(text, path)
    if not isinstance(samples, list):
        raise MSDError(f"The data {str(path)!r} must hold a list of objects, not a {type(samples).__name__}.")
    return [_object(sample, path, f"element {number}") for number, sample in enumerate(samples, 1)]


def _parse(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place, problem = f"line {first_line}", str(error)
        if isinstance(error, json.JSONDecodeError):
            place, problem = f"line {first_line + error.lineno - 1}, column {error.colno}", error.msg
        advice = "" if path.suffix in (".json", ".jsonl") else " Name it .json (a list) or .jsonl (one sample a line)."
        raise MSDError(f"The data {str(path)!r} is not valid JSON ({place}): {problem}.{advice}") from error


def _object(sample: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(sample, dict):
        raise MSDError(
            f"The data {str(path)!r} must hold a list of objects, one for each conversation, but {place} is a "
            f"{type(sample).__name__}."
        )
    return sample


__all__ = ["read_samples"]
