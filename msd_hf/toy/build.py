"""Trains the toy pair from scratch: `python -m msd_hf.toy.build --output DIR`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging

from ..draft.folder import DRAFT_FOLDER
from ..errors import MSDError, errors_end_script
from ..loading import load_target, load_target_and_processor
from ..writing.destination import check_destination
from .accuracy import KIND_GROUPS, accuracy_table, generate_answers, make_evaluation_prompts, score_answers
from .draft import save_draft, toy_samples, train_draft
from .evaluate import evaluate_pair
from .processor import build_processor
from .target import (
    TARGET_FOLDER,
    build_shallow_target,
    build_target_config,
    deepen,
    save_target,
    scale_projector,
    train_target,
)
from .training import Budget
from .vision import pretrain_vision_tower


logger = logging.get_logger(__name__)
console = Console(width=100)

# Learning rate of the deepened model, relative to the rates of `build_optimizer`. The model is trained already, so it
# takes smaller steps.
DEEP_RATE = 0.3


def build_pair(
    output: Annotated[Path, typer.Option(help="Folder that `target` and `draft` are written to.")],
    vision_seconds: Annotated[float, typer.Option(help="Seconds for training the vision tower alone.")] = 100.0,
    shallow_seconds: Annotated[float, typer.Option(help="Seconds for training a shallow target.")] = 1020.0,
    deep_seconds: Annotated[float, typer.Option(help="Seconds for training the target with all layers.")] = 360.0,
    vision_steps: Annotated[int | None, typer.Option(help="Steps instead of --vision-seconds.")] = None,
    shallow_steps: Annotated[int | None, typer.Option(help="Steps instead of --shallow-seconds.")] = None,
    deep_steps: Annotated[int | None, typer.Option(help="Steps instead of --deep-seconds.")] = None,
    draft_steps: Annotated[int, typer.Option(help="Steps of the draft's training.")] = 1200,
    draft_samples: Annotated[
        int, typer.Option(help="Training conversations of the draft, half of them visual.")
    ] = 4000,
    batch_size: Annotated[int, typer.Option(help="Conversations per step.")] = 16,
    prompts_per_kind: Annotated[int, typer.Option(help="Held-out questions of each kind in the final test.")] = 40,
    draft_only: Annotated[bool, typer.Option("--draft-only", help="Keep the target that is in the folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace `target` and `draft` if they hold a toy pair.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data and initial weights.")] = 0,
) -> None:
    """Train and save a target and its draft, and measure both on held-out questions."""
    if not draft_only:
        check_destination(output / "target", TARGET_FOLDER, overwrite)
        if (output / "work").exists():
            raise MSDError(f"{str(output / 'work')!r} holds features of an earlier target: remove it first.")
    check_destination(output / "draft", DRAFT_FOLDER, overwrite)
    logging.set_verbosity_info()
    started = time.monotonic()
    if not draft_only:
        budgets = (
            Budget(vision_steps, None if vision_steps else vision_seconds),
            Budget(shallow_steps, None if shallow_steps else shallow_seconds),
            Budget(deep_steps, None if deep_steps else deep_seconds),
        )
        build_target_folder(output / "target", *budgets, batch_size, prompts_per_kind, seed, overwrite)
        console.print(f"target after {(time.monotonic() - started) / 60:.1f} minutes")
    build_draft_folder(output, draft_steps, draft_samples, batch_size, seed, overwrite)
    console.print(f"draft after {(time.monotonic() - started) / 60:.1f} minutes")
    evaluate_pair(output / "target", output / "draft", repeats=1, seed=seed)


def build_target_folder(
    folder: Path,
    vision_budget: Budget,
    shallow_budget: Budget,
    deep_budget: Budget,
    batch_size: int,
    prompts_per_kind: int,
    seed: int,
    overwrite: bool = False,
) -> None:
    """Trains the vision tower, then a shallow target, then the target with all layers. Saves the target and prints its
    accuracy on held-out questions."""
    processor = build_processor(seed)
    model = build_shallow_target(processor, seed)
    probes = pretrain_vision_tower(model.model.vision_tower, processor, vision_budget, seed)
    console.print("vision tower:", {name: f"{value:.1%}" for name, value in probes.items()})
    scale_projector(model, processor, seed)
    model.model.vision_tower.requires_grad_(False)
    train_target(model, processor, shallow_budget, seed, batch_size)
    model = deepen(model, build_target_config(processor))
    model.model.vision_tower.requires_grad_(False)
    console.print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads")
    train_target(model, processor, deep_budget, seed + 1, batch_size, DEEP_RATE)
    save_target(model, processor, folder, overwrite)
    # The model is loaded again, to measure the rounded weights on disk, which users load.
    print_accuracy(load_target(folder), processor, prompts_per_kind, seed)


def print_accuracy(target: Any, processor: Any, prompts_per_kind: int, seed: int) -> None:
    """Prints the accuracy of generated answers on the test split, by kind of question."""
    prompts = make_evaluation_prompts(prompts_per_kind, seed)
    answers = generate_answers(target, processor, prompts)
    console.print(accuracy_table(score_answers(prompts, answers), KIND_GROUPS))
    lengths = [len(processor.tokenizer(answer)["input_ids"]) for answer in answers]
    console.print(f"mean answer length {sum(lengths) / len(lengths):.1f} tokens")


def build_draft_folder(
    output: Path, num_steps: int, num_samples: int, batch_size: int, seed: int, overwrite: bool = False
) -> None:
    """Trains a new draft for the target in `output`, and saves it in the same folder."""
    target, processor = load_target_and_processor(output / "target")
    trainer = train_draft(
        target, processor, output / "work", num_steps, toy_samples(num_samples, seed), seed, batch_size
    )
    console.print(f"draft of {trainer.model.num_parameters():,} parameters")
    save_draft(trainer, output / "draft", overwrite)


if __name__ == "__main__":
    with errors_end_script():
        typer.run(build_pair)
