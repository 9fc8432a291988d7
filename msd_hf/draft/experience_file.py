"""Reads and writes `experience.json`, what automatic trees have learnt with a draft."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..tree.saved_experience import EXPERIENCE_NAME, table_of
from ..writing.saving import replace_text
from .files import errors_name_file, find_file, read_json


logger = logging.get_logger(__name__)


def write_experience(draft: Any, folder: str | os.PathLike[str]) -> None:
    """Writes what automatic trees have learnt with a draft into its folder; a warning if there is nothing yet."""
    fields = table_of(draft).fields()
    if not fields["experiences"]:
        logger.warning(
            'There is no experience to save yet: only calls with `num_assistant_tokens="auto"`, the default, learn.'
        )
        return
    replace_text(Path(folder, EXPERIENCE_NAME), json.dumps(fields) + "\n")


def read_experience(draft: Any, name_or_path: str | Path, location: Mapping[str, Any]) -> None:
    """
    Gives a draft the experience of its checkpoint, if there is any.

    Raises:
        MSDCheckpointError: when the file is damaged.
    """
    path = find_file(name_or_path, EXPERIENCE_NAME, location)
    if path is None:
        return
    fields = read_json(path)
    with errors_name_file(path, "the experience of a draft"):
        table_of(draft).read(fields)


__all__ = ["read_experience", "write_experience"]
