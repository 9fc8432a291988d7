"""Checkpoints on disk: which of them are complete, and how files take their place in a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging

from ..draft.folder import PROVENANCE_NAME
from ..errors import MSDError
from ..writing.saving import SAFETENSORS_TEMPORARY
from .hard_examples import HARD_EXAMPLES_NAME


logger = logging.get_logger(__name__)

STATE_NAME = "trainer_state.json"
_STAGING_NAME = ".msd-saving"
# What `Trainer`, accelerate, FSDP and DeepSpeed write into a checkpoint. Other files are the user's and stay.
_CHECKPOINT_FILES = (
    _STAGING_NAME,
    "config.json",
    "generation_config.json",
    HARD_EXAMPLES_NAME,
    "model*.safetensors*",
    "optimizer*",
    "pytorch_model*",
    "rng_state*.pth",
    "scaler.pt",
    "scheduler.pt",
    "training_args.bin",
    PROVENANCE_NAME,
    "latest",
    "global_step*",
    "zero_to_*.py",
    f"{STATE_NAME}*",
    f".{STATE_NAME}.*.tmp",
    SAFETENSORS_TEMPORARY,
)


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-STEP` in an output folder, complete or not, the newest one first."""
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()
    }
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end. `Trainer` writes the state last."""
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / "config.json").is_file()


def complete_checkpoints(folder: str | Path) -> list[str]:
    """
    The complete checkpoints in an output folder, the newest one first.

    A run that is killed while it writes or removes a checkpoint leaves an incomplete one behind.
    """
    found = []
    for path in checkpoints(folder):
        if is_complete(path):
            found.append(str(path))
        else:
            logger.warning("The checkpoint %s is incomplete: training does not resume from it.", path)
    return found


def remove_leftovers(folder: str | Path) -> None:
    """Removes incomplete checkpoints and temporary files that a killed run left in its output folder."""
    shutil.rmtree(Path(folder) / _STAGING_NAME, ignore_errors=True)
    for path in checkpoints(folder):
        if not is_complete(path):
            remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes the files of a checkpoint, and its folder if the user has put nothing else there."""
    for pattern in _CHECKPOINT_FILES:
        for path in checkpoint.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()


@contextmanager
def moved_into(folder: Path, last: str) -> Iterator[Path]:
    """
    A temporary folder whose files replace those in `folder` when the block ends without an error. If it ends with
    one, `folder` is as before.

    Args:
        last: name of the file that is moved last. A run that is killed in between leaves `folder` without it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / _STAGING_NAME
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        paths = sorted(temporary.iterdir(), key=lambda path: path.name == last)
        for path in paths:
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        (folder / last).unlink(missing_ok=True)
        for path in paths:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_errors(folder: Path, advice: str) -> Iterator[None]:
    """
    Turns an error of the disk into one sentence.

    Raises:
        MSDError: when a file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        if isinstance(error, RuntimeError):
            # `torch.save` loses the reason: a full disk is an error of its writer.
            if not any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")):
                raise
            reason = "torch.save failed, the disk may be full"
        raise MSDError(f"{str(folder)!r} could not be written: {reason}. {advice}") from error


__all__ = [
    "STATE_NAME",
    "checkpoints",
    "complete_checkpoints",
    "is_complete",
    "moved_into",
    "remove_checkpoint",
    "remove_leftovers",
    "write_errors",
]
