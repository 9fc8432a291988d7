"""Checks of the disk before long work: a folder can be written to, and has the space that is needed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..errors import MSDError


def check_writable(folder: str | Path) -> None:
    """
    Checks that files can be written to a folder, by writing one and removing it. The folder need not exist yet; it is
    not created.

    Raises:
        MSDError: when `folder` or a parent of it is a file, or cannot be written to.
    """
    existing = _existing(folder)
    if not existing.is_dir():
        raise MSDError(f"Nothing can be written to {str(folder)!r}: {str(existing)!r} is not a folder.")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # it has no name, so that a kill leaves nothing behind
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise MSDError(
            f"Nothing can be written to {str(folder)!r}: {error.strerror}. Choose another folder, or free some space."
        ) from error


def check_space(folder: str | Path, num_bytes: int, subject: str, advice: str) -> None:
    """
    Checks that the disk of `folder` has `num_bytes` left. The folder need not exist yet.

    Raises:
        MSDError: when less is left. It names both numbers.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if num_bytes > free:
        raise MSDError(
            f"{subject} need about {format_bytes(num_bytes)}, but the disk of {str(folder)!r} has "
            f"{format_bytes(free)} left. {advice}"
        )


def format_bytes(number: float) -> str:
    """A number of bytes as text, with a unit of powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"


def _existing(folder: str | Path) -> Path:
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


__all__ = ["check_space", "check_writable", "format_bytes"]
