"""Finding the checkpoint that a run resumes from."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

# `Trainer` writes the state last: a checkpoint that has it is complete.
_FILES = ("config.json", "trainer_state.json")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """
    The newest complete checkpoint in an output folder; `None` if there is none.

    A run that is killed while it writes or removes a checkpoint leaves an incomplete one behind.
    """
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        if all((path / name).is_file() for name in _FILES):
            return str(path)
        logger.warning("The checkpoint %s is incomplete: training does not resume from it.", path)
    return None


__all__ = ["last_complete_checkpoint"]
