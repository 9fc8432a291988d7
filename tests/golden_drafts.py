"""Reads the golden sets of other kinds of drafts: numbers from runs of their own programs (see golden/README.md)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


FOLDER = Path(__file__).parent / "golden" / "drafts"
# The programs compute in float32. Computed again in float64, hidden states differ by up to 9e-6, logits by up to 2e-5.
ATOL_STATES, ATOL_LOGITS = 2e-5, 1e-4
AUX_IDS = [1, 3, 5]  # of all sets; flat checkpoints do not name them
SETS = sorted(path.stem for path in FOLDER.glob("eagle3_forward_*.json") if "image" not in path.stem)


@functools.cache
def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def checkpoints() -> dict[str, Any]:
    """The configuration of each checkpoint, and the names of its weights in `weights.safetensors` and
    `vispec_weights.safetensors`: most are the same in several checkpoints."""
    return json.loads((FOLDER / "checkpoints.json").read_text())


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "weights.safetensors") | load_file(FOLDER / "vispec_weights.safetensors")


def weights_of(name: str) -> dict[str, torch.Tensor]:
    return {key: _weights()[stored] for key, stored in checkpoints()[name]["weights"].items()}


def write_checkpoint(name: str, folder: Path, use_bin: bool = False, **changes: Any) -> Path:
    """Writes a checkpoint as it was published, with changed entries of its configuration; `None` removes one."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {**checkpoints()[name]["config"], **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if use_bin:
        torch.save(weights_of(name), folder / "pytorch_model.bin")
    else:
        save_file(weights_of(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def checkpoint_of(name: str) -> str:
    """The checkpoint whose weights a set was computed with."""
    info = load(name)[1]
    return info["checkpoint"] or info["weights"].split(",")[0].removeprefix("tensors of ")


def flags_of(name: str) -> dict[str, Any]:
    """The fields of the configuration in which a set may differ from its checkpoint."""
    config = load(name)[1]["config"]
    return {"norm_before_residual": config["norm_before_residual"], "norm_output": config["norm_output"]}
