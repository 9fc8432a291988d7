"""The command `msd-hf train`: trains a draft."""

from __future__ import annotations

import typer

from .next_step import print_next
from .options import console


def train(context: typer.Context) -> None:
    """Train a draft for a target, in two stages: text, then more and more images."""
    from ..training.script import run_training

    trainer = run_training(context.args)
    if trainer.is_world_process_zero():
        metrics = trainer.provenance()["metrics"]
        for name in ("eval_tau", "eval_tau_text", "eval_tau_visual"):
            if name in metrics:
                console.print(f"{name.removeprefix('eval_'):12}{metrics[name]:.2f}")
        console.print(f"The draft is in {trainer.args.output_dir}.", soft_wrap=True)
        target = trainer.target.config.name_or_path
        print_next("bench", "--target", target, "--draft", trainer.args.output_dir, "--data", "CONVERSATIONS.json")
