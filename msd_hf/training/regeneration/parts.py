"""The lines that several processes have written of one data set, each process into its own file."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any

from .journal import Journal, partial_path


class Parts:
    """
    What the part files of an output hold, by the index of the sample. Only places are kept in memory.

    Args:
        output: the final file.
        settings: the settings of the run, which each part must have.

    Raises:
        MSDError: when a part was begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self._places: dict[int, tuple[Path, int]] = {}
        for number in part_numbers(output):
            with Journal(output, settings, number) as part:
                for place, record in part.placed_records():
                    self._places[record["index"]] = (part.path, place)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def record(self, index: int) -> dict[str, Any]:
        """The line of a sample, without its index."""
        path, place = self._places[index]
        with open(path, "rb") as file:
            file.seek(place)
            record = json.loads(file.readline())
        del record["index"]
        return record


def part_numbers(output: Path) -> list[int]:
    """The numbers of the part files of an output."""
    path = partial_path(output)
    names = (other.name.removeprefix(f"{path.name}-") for other in path.parent.glob(f"{glob.escape(path.name)}-*"))
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def remove_parts(output: Path) -> None:
    """Removes the part files of an output."""
    for number in part_numbers(output):
        partial_path(output, number).unlink(missing_ok=True)


__all__ = ["Parts", "part_numbers", "remove_parts"]
