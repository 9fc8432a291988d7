"""Reads the golden sets: numbers from runs of the original implementation (see golden/README.md)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from msd_hf import MSDDraftModel


GOLDEN = Path(__file__).parent / "golden"
# Tolerance for hidden states: the original computes norms, softmax and rotary tables in float32.
ATOL = 5e-6


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def write_original_checkpoint(weights_name: str, folder: Path, model_type: str, use_bin: bool = True) -> Path:
    """Writes golden draft weights as a checkpoint in the format of the original repository."""
    weights, info = load(weights_name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**info["config"], "model_type": model_type}))
    if use_bin:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_draft(weights_name: str, folder: Path, dtype: torch.dtype = torch.float64) -> MSDDraftModel:
    """Loads the golden draft with the code that loads original checkpoints."""
    model_type = "qwen2_vl" if "qwen2vl" in weights_name else "llava"
    path = write_original_checkpoint(weights_name, folder / weights_name, model_type)
    return MSDDraftModel.from_pretrained(path, dtype=dtype)


def shifted_visual_mask(values: dict[str, torch.Tensor], image_id: int | None, num_image: int) -> torch.Tensor:
    """Which draft rows are visual, `[1, L]`: row j describes expanded position j + 1."""
    prompt = values["prompt_ids"][0].tolist()
    expanded: list[bool] = []
    for token in prompt:
        if token == -200:
            expanded += [True] * num_image
        else:
            expanded.append(image_id is not None and token == image_id)
    return torch.tensor([[*expanded[1:], False]])
