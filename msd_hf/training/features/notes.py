"""
Notes beside the shards of a feature cache, which the index takes over.

Several processes write the shards of one cache, in no order, and process 0 alone writes the index. The entry of a
shard therefore waits as `shard-NNNNN.json` until all earlier shards are in the index. If the run is killed, the notes
stay, and the next run takes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .storage import safely_replaced_file


_NAME = re.compile(r"shard-(\d{5})\.json")
_FIELDS = {"file", "bytes", "samples", "tokens", "ids", "skipped"}


def write_note(folder: Path, shard_id: int, entry: dict[str, Any]) -> None:
    """Writes the index entry of a shard beside it."""
    with safely_replaced_file(_path(folder, shard_id)) as temporary:
        temporary.write_text(json.dumps(entry, separators=(",", ":")) + "\n", encoding="utf-8")


def read_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """The entries that wait in a folder, by the number of the shard. A damaged note is no note."""
    notes = {}
    for path in folder.glob("shard-*.json"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(entry, dict) and set(entry) == _FIELDS:
            notes[int(match[1])] = entry
    return notes


def remove_notes(folder: Path, shard_ids: Iterable[int]) -> None:
    """Removes the notes that the index has taken over."""
    for shard_id in shard_ids:
        _path(folder, shard_id).unlink(missing_ok=True)


def _path(folder: Path, shard_id: int) -> Path:
    return folder / f"shard-{shard_id:05d}.json"


__all__ = ["read_notes", "remove_notes", "write_note"]
