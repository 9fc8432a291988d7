"""Writing folders and files that exist either completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """
    A temporary folder that takes the name `folder` when the block ends without an error.

    An older folder of this name is removed only at that moment.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        # Only the owner can read folders of mkdtemp and files of safetensors.
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes the name `path` when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a text file that appears under its name only when it is complete."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


__all__ = ["replace_text", "replaced_file", "replaced_folder"]
