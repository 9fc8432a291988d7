"""The place from which a run goes on: the beginning, a checkpoint of the same run, or its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import MSDError
from .checkpointing import complete_checkpoints, is_complete
from .provenance import PROVENANCE_NAME, read_provenance
from .run_fingerprint import differences


logger = logging.get_logger(__name__)

_FORCE = "train on with --force --resume-from-checkpoint PATH"


@dataclass(frozen=True)
class ResumePoint:
    """
    Where a run goes on.

    Args:
        folder: the checkpoint, or the finished draft; `None` for the beginning.
        finished: whether `folder` holds the draft of a run that has come to its end.
    """

    folder: str | None = None
    finished: bool = False


def find_resume_point(
    resume: str | Path | bool | None, force: bool, output_dir: str, fingerprint: dict[str, Any]
) -> ResumePoint:
    """
    Finds the place from which a run goes on. It may be called with a part of the fingerprint, before the target is
    loaded.

    Args:
        resume: a checkpoint, `True` for the last one of this run in `output_dir`, or nothing.
        force: go on from the given checkpoint even if it belongs to another run.
        output_dir: the output folder of the run.
        fingerprint: what the run depends on ([`run_fingerprint`]).

    Raises:
        MSDError: when there is no such checkpoint, it belongs to another run, or `force` cannot be used.
    """
    if force and not isinstance(resume, (str, Path)):
        raise MSDError("--force needs the checkpoint to go on from: --resume-from-checkpoint PATH.")
    if not resume:
        return ResumePoint()
    if resume is not True:
        if not is_complete(resume):
            raise MSDError(f"--resume-from-checkpoint {str(resume)!r} is not a complete checkpoint of a draft.")
        _check_same_run(str(resume), fingerprint, force)
        return ResumePoint(str(resume))
    if _holds_finished_draft(output_dir) and _problem(output_dir, fingerprint) is None:
        return ResumePoint(output_dir, finished=True)
    # The folder may also hold checkpoints of an earlier run, which may be further.
    found = complete_checkpoints(output_dir)
    for checkpoint in found:
        if _problem(checkpoint, fingerprint) is None:
            return ResumePoint(checkpoint)
    if found:
        _check_same_run(found[0], fingerprint, force)
    if (Path(output_dir) / PROVENANCE_NAME).is_file():  # the draft of a run that kept no checkpoints
        _check_same_run(output_dir, fingerprint, force)
    return ResumePoint()


def _holds_finished_draft(folder: str) -> bool:
    has_weights = any((Path(folder) / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    return has_weights and read_provenance(folder).get("finished") is True


def _check_same_run(folder: str, fingerprint: dict[str, Any], force: bool) -> None:
    problem = _problem(folder, fingerprint)
    if problem is None:
        return
    if not force:
        raise MSDError(
            f"{problem}. Give the same settings and data, {_FORCE}, or start again without --resume-from-checkpoint."
        )
    logger.warning("%s. Training goes on from it because of --force.", problem)


def _problem(folder: str, fingerprint: dict[str, Any]) -> str | None:
    old = read_provenance(folder).get("fingerprint")
    if old is None:
        return f"{folder!r} does not say from which run it is: an older version of msd_hf made it"
    found = differences(old, fingerprint)
    return f"{folder!r} belongs to another run: it was made with {'; with '.join(found)}" if found else None


__all__ = ["ResumePoint", "find_resume_point"]
