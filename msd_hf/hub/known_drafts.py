"""The table of published drafts, `known_drafts.json`: those that the authors of the paper name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .names import public_name


@dataclass(frozen=True)
class KnownDraft:
    """
    A draft, and the targets that it is for.

    Args:
        name: id on the Hub, or folder.
        kind: method and format.
        license: identifier of its licence; "unknown" if none is stated.
        targets: ids of its target on the Hub, the one in the format of transformers first; empty if they are unknown.
        target_model_type, target_text_model_type: kinds of target and decoder; `None` if they are unknown.
        hidden_size: width of target and draft; `None` if it is unknown.
    """

    name: str
    kind: str = "MSD"
    license: str = "unknown"
    targets: tuple[str, ...] = ()
    target_model_type: str | None = None
    target_text_model_type: str | None = None
    hidden_size: int | None = None


@cache
def known_drafts() -> tuple[KnownDraft, ...]:
    """The drafts of the table."""
    entries: list[dict[str, Any]] = json.loads(Path(__file__).with_name("known_drafts.json").read_text("utf-8"))
    return tuple(KnownDraft(**{**entry, "targets": tuple(entry["targets"])}) for entry in entries)


def target_of_original(draft_name: str, fields: dict[str, Any]) -> str | None:
    """
    The id of the target of a draft in the original format.

    Args:
        draft_name: id or folder of the draft; the table names the target of a published draft.
        fields: its `config.json`, in which the original code may have left the name of the target.
    """
    known = {name.lower(): draft.targets[0] for draft in known_drafts() for name in (draft.name, *draft.targets)}
    names = [public_name(draft_name)[0], fields.get("_name_or_path")]
    return next((known[name.lower()] for name in names if isinstance(name, str) and name.lower() in known), None)


__all__ = ["KnownDraft", "known_drafts", "target_of_original"]
