"""Saves models that are small on disk and run in float32: float16 weights, and a configuration that says float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel


def save_rounded(model: PreTrainedModel, folder: Path) -> None:
    """
    Rounds the weights of `model` to float16, in place, and writes the model to `folder`.

    The written configuration says float32, so that users load the model in float32. `model` itself is float32
    afterwards too, with the rounded weights.
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
