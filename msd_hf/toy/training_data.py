"""Conversations of the toy world as files to train on: `python -m msd_hf.toy.training_data --output DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..writing.saving import replace_text
from .dataset import write_dataset


def write_training_data(
    output: Annotated[Path, typer.Option(help="Folder that is written to.")],
    samples: Annotated[int, typer.Option(help="Number of conversations; 60% of them have a picture.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the conversations.")] = 0,
) -> None:
    """Write conversations to train on: `train.json`, its two kinds as `text.json` and `visual.json`, a twentieth of
    their number as `test.json`, and `images`."""
    path = write_dataset(output, "train", samples, seed)
    write_dataset(output, "test", max(1, samples // 20), seed)
    entries = json.loads(path.read_text(encoding="utf-8"))
    for name, visual in (("text", False), ("visual", True)):
        chosen = [entry for entry in entries if ("image" in entry) is visual]
        replace_text(output / f"{name}.json", json.dumps(chosen, indent=1))


if __name__ == "__main__":
    typer.run(write_training_data)
