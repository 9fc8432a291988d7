"""Drafts that tests fit are fitted once in a run: its processes share the weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from msd_hf import MSDDraftModel


_folder: Path | None = None  # `None`: the run has one process, which keeps its pairs in memory


def share_fits(folder: Path) -> None:
    """Names the folder of this run, which all its processes see."""
    global _folder
    folder.mkdir(parents=True, exist_ok=True)
    _folder = folder


def fitted(name: str, draft: MSDDraftModel, fit: Callable[[], object]) -> MSDDraftModel:
    """Calls `fit` on a draft, or loads what another process has made of it."""
    path = None if _folder is None else _folder / f"{name}.pt"
    if path is not None and path.exists():
        draft.load_state_dict(torch.load(path, weights_only=True))
        return draft.eval()
    fit()
    if path is not None:
        own = path.with_suffix(f".{os.getpid()}")
        torch.save(draft.state_dict(), own)
        own.replace(path)
    return draft.eval()
