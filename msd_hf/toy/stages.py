"""Stages of a long training, each kept in a folder, so that a stopped build continues after its last finished one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..loading import load_target


logger = logging.get_logger(__name__)


def stage(folder: Path, make: Callable[[], Any]) -> Any:
    """The model of a stage, in float32: `folder`'s if the stage ended before, else `make`'s, which is saved there."""
    if not (folder / "config.json").is_file():
        make().save_pretrained(folder)
        logger.info("Finished the stage %r.", folder.name)
    return load_target(folder, "float32")
