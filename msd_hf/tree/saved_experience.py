"""What automatic trees have learnt, in a small file beside the weights of a draft, so that a server starts warm.

The file names the kind of device and of target, and no machine. It decides the size of trees and never a token.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .experience import Experience
from .settings import TreeSettings


EXPERIENCE_NAME = "experience.json"
_FORMAT = 1


@dataclass(frozen=True)
class Circumstances:
    """
    What the costs of a round depend on, besides settings, context and rows.

    Args:
        device (`str`): `"cpu"` with the number of threads, or the name of a GPU's model.
        draft_dtype, target_dtype, attention (`str`): dtypes, and the target's attention implementation.
        target (`str`): model type of the target's decoder.
        hidden_size, num_layers, vocab_size (`int`, *optional*): of the target's decoder.
        rows_in_step (`int`): rows of a batch that advances at the pace of its slowest row, which accepts less; 0 if
            each row advances on its own.
    """

    device: str
    draft_dtype: str
    target_dtype: str
    attention: str | None
    target: str
    hidden_size: int | None
    num_layers: int | None
    vocab_size: int | None
    rows_in_step: int = 0


_Key = tuple[Circumstances, TreeSettings]


class ExperienceTable:
    """The experiences of one draft: those that a file brought, and those of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[_Key, dict[str, Any]] = {}
        # Weak, because `release` must free what a pair has learnt.
        self._own: weakref.WeakValueDictionary[_Key, Experience] = weakref.WeakValueDictionary()

    def make(self, circumstances: Circumstances, settings: TreeSettings) -> Experience:
        """Makes an experience, which begins with what a file says about the same circumstances and settings."""
        key = circumstances, settings
        with self._lock:
            saved = self._read.get(key)
            made = Experience(settings.num_nodes)
            if saved is not None:
                made.load_state(saved)
            self._own[key] = made
            return made

    def read(self, fields: Mapping[str, Any]) -> None:
        """
        Takes over the content of a file. That of another release's format is left aside.

        Raises:
            ValueError, TypeError, KeyError: when the content is damaged.
        """
        if fields.get("format") != _FORMAT:
            return
        found = {}
        for entry in fields["experiences"]:
            settings = TreeSettings(**entry["settings"], is_auto=True)
            Experience(settings.num_nodes).load_state(entry["measured"])  # checks it
            found[Circumstances(**entry["circumstances"]), settings] = entry["measured"]
        with self._lock:
            self._read.update(found)

    def fields(self) -> dict[str, Any]:
        """The content of the file; without experiences if nothing was learnt."""
        with self._lock:
            measured = {**self._read, **{key: own.state() for key, own in self._own.items() if own.has_measured}}
        entries = []
        for (circumstances, settings), state in measured.items():
            bounds = {name: value for name, value in asdict(settings).items() if name != "is_auto"}
            entries.append({"circumstances": asdict(circumstances), "settings": bounds, "measured": state})
        return {"format": _FORMAT, "experiences": entries}


_lock = threading.Lock()
_tables: weakref.WeakKeyDictionary[Any, ExperienceTable] = weakref.WeakKeyDictionary()  # draft -> its table


def table_of(draft: Any) -> ExperienceTable:
    """The table of a draft."""
    with _lock:
        return _tables.setdefault(draft, ExperienceTable())


def forget(draft: Any) -> None:
    """Drops the table of a draft."""
    with _lock:
        _tables.pop(draft, None)


__all__ = ["EXPERIENCE_NAME", "Circumstances", "ExperienceTable", "forget", "table_of"]
