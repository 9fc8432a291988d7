"""Trains the pair of the hard world from scratch: `python -m msd_hf.toy.hard.build --output DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging

from ...draft.folder import DRAFT_FOLDER
from ...errors import errors_end_script
from ...loading import load_target_and_processor
from ...terminal import make_console
from ...writing.destination import check_destination
from ..draft import save_draft, train_draft
from ..stages import stage
from ..target import deepen, save_target
from ..training import Budget
from .dataset import HardSamples, SampleKind
from .evaluate import print_accuracy
from .processor import MAX_LENGTH, build_processor
from .target import (
    DEEP_LESSON,
    LESSONS,
    Batches,
    build_shallow_target,
    build_target_config,
    scale_features,
    train_target,
)
from .vision import pretrain_vision_tower


console = make_console(width=100)

# Learning rate of the deepened model, relative to the rates of `build_optimizer`.
DEEP_RATE = 0.3
VISUAL: tuple[SampleKind, ...] = ("small", "large", "album", "large", "album", "gallery")


def build_pair(
    output: Annotated[Path, typer.Option(help="Folder that `target` and `draft` are written to.")],
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone.")] = 2500,
    first_steps: Annotated[int, typer.Option(min=1, help="Steps of five layers on tiny pictures.")] = 1200,
    second_steps: Annotated[int, typer.Option(min=1, help="The same on tiny and small pictures.")] = 1500,
    third_steps: Annotated[int, typer.Option(min=1, help="The same on large pictures and albums.")] = 3500,
    deep_steps: Annotated[int, typer.Option(min=1, help="Steps of the target with all layers.")] = 300,
    draft_steps: Annotated[int, typer.Option(min=1, help="Steps of the draft's training.")] = 1200,
    draft_samples: Annotated[int, typer.Option(min=2, help="Conversations of the draft, half of them visual.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations per step of the draft.")] = 8,
    prompts_per_kind: Annotated[int, typer.Option(min=1, help="Held-out questions of each kind in the test.")] = 20,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace `draft` if it holds the draft of a small pair.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data and initial weights.")] = 0,
) -> None:
    """Train and save a target and its draft, and measure the target on held-out questions. A stopped build continues
    after its last finished stage; a folder `target` that is there is kept."""
    check_destination(output / "draft", DRAFT_FOLDER, overwrite)
    logging.set_verbosity_info()
    build_target_folder(output, vision_steps, (first_steps, second_steps, third_steps), deep_steps, seed)
    print_accuracy(output / "target", prompts_per_kind, seed)
    build_draft_folder(output, draft_steps, draft_samples, batch_size, seed, overwrite)


def build_target_folder(
    output: Path, vision_steps: int, lesson_steps: Sequence[int], deep_steps: int, seed: int = 0
) -> None:
    """Trains the vision tower, then a shallow target by the lessons, then the target with all layers; saves it as
    `target`."""
    folder, work = output / "target", output / "work"
    if folder.exists():
        return
    processor = build_processor(seed)

    def see() -> Any:
        model = build_shallow_target(processor, seed)
        probes = pretrain_vision_tower(model.model.vision_tower, processor, Budget(vision_steps), seed)
        console.print("vision tower:", {name: f"{value:.1%}" for name, value in probes.items()})
        scale_features(model, processor, seed)
        return model

    def learn(model: Any, lesson: Batches, steps: int, number: int) -> Any:
        model.model.vision_tower.requires_grad_(False)
        train_target(model, processor, lesson, Budget(steps), seed + number)
        return model

    model = stage(work / "vision", see)
    for number, (lesson, steps) in enumerate(zip(LESSONS, lesson_steps, strict=True), 1):
        model = stage(work / f"lesson-{number}", partial(learn, model, lesson, steps, number))
    model = deepen(model, build_target_config(processor))
    model.model.vision_tower.requires_grad_(False)
    console.print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads")
    train_target(model, processor, DEEP_LESSON, Budget(deep_steps), seed + len(LESSONS) + 1, DEEP_RATE)
    save_target(model, processor, folder)


def draft_samples(num_samples: int, seed: int) -> dict[Any, HardSamples]:
    """`num_samples` training conversations of the hard world, half of them visual."""
    return {
        "text": HardSamples("train", num_samples // 2, seed, "text"),
        "visual": HardSamples("train", num_samples // 2, seed, *VISUAL),
    }


def build_draft_folder(
    output: Path, num_steps: int, num_samples: int, batch_size: int, seed: int, overwrite: bool = False
) -> None:
    """Trains a new draft for the target in `output`, and saves it in the same folder."""
    target, processor = load_target_and_processor(output / "target")
    samples = draft_samples(num_samples, seed)
    # One conversation a forward, because pictures of several sizes do not fit into one.
    trainer = train_draft(
        target, processor, output / "work", num_steps, samples, seed, batch_size, 1, max_length=MAX_LENGTH
    )
    console.print(f"draft of {trainer.model.num_parameters():,} parameters")
    save_draft(trainer, output / "draft", overwrite)


if __name__ == "__main__":
    with errors_end_script():
        typer.run(build_pair)
