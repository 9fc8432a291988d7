"""Models that are small on disk and exact on a CPU: float16 weights, and a configuration that says float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel


def save_rounded(model: PreTrainedModel, folder: Path) -> None:
    """
    Rounds the weights of `model` to float16, in place, and writes the model to `folder`.

    The configuration says float32, so that the model is loaded in float32. `model` is float32 afterwards too.
    """
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(config[name] for name in model.config.sub_configs)):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.float()
    model.config.dtype = torch.float32


__all__ = ["save_rounded"]
