"""Writing files that exist either completely or not at all."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Beside a file that it writes, safetensors keeps a temporary one of such a name (a glob); a killed process leaves it.
SAFETENSORS_TEMPORARY = ".tmp" + 6 * "[A-Za-z0-9]"


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


def remove_temporary_files(path: str | Path) -> None:
    """Removes the temporary files of `path` that killed processes left behind."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if temporary.name.removeprefix(f".{path.name}.").removesuffix(".tmp").isdigit():
            temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a text file that appears under its name only when it is complete."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


__all__ = ["SAFETENSORS_TEMPORARY", "remove_temporary_files", "replace_text", "replaced_file"]
