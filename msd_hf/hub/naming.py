"""Names the target of a draft whose folder does not say it, or names a folder that others do not have."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import MSDError
from ..writing.saving import replace_text
from .card import read_draft_config
from .names import is_hub_id


def name_target(folder: str | Path, target: str | None) -> bool:
    """
    Writes the Hub id of its target into the configuration of a draft.

    Args:
        folder: the draft's folder.
        target (*optional*): the id; nothing is written without it.

    Returns:
        Whether the draft names a target on the Hub now.

    Raises:
        MSDError: when there is no draft in the folder, `target` is no id of the Hub, or the draft names another one.
    """
    config = read_draft_config(folder)
    named = config.get("target_name_or_path")
    if target is None or target == named:
        return is_hub_id(named)
    if not is_hub_id(target):
        raise MSDError(f"{target!r} is no id of a model on the Hub (owner/name).")
    if is_hub_id(named):
        raise MSDError(f"The draft in {str(folder)!r} was made for {named!r}, not for {target!r}: leave --target out.")
    path = Path(folder) / "config.json"
    replace_text(path, json.dumps({**config, "target_name_or_path": target}, indent=2, sort_keys=True) + "\n")
    return True


__all__ = ["name_target"]
