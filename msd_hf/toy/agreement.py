"""Measures the agreement of the toy pair in low precision: `python -m msd_hf.toy.agreement --dtype bfloat16`."""

from __future__ import annotations

import copy
import random
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils import logging

from ..draft.modeling_msd import MSDDraftModel
from ..evaluation import Disagreement, find_disagreement
from ..loading import load_target_and_processor
from ..prompts import build_inputs
from . import DRAFT_DIR, TARGET_DIR
from .accuracy import make_evaluation_prompts
from .text_questions import TEXT_KINDS
from .visual_questions import VISUAL_KINDS


class Precision(str, Enum):
    """The dtype of the weights and of all arithmetic."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


def measure_agreement(
    dtype: Annotated[Precision, typer.Option(help="Dtype of target and draft.")] = Precision.bfloat16,
    generations: Annotated[int, typer.Option(min=1, help="Held-out questions, of all kinds.")] = 200,
    target_folder: Annotated[Path, typer.Option("--target", help="Folder of the target.")] = TARGET_DIR,
    draft_folder: Annotated[Path, typer.Option("--draft", help="Folder of the draft.")] = DRAFT_DIR,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 140,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
) -> None:
    """Generate with and without the draft, and explain each difference. The exit status is 1 if rounding does not
    explain one of them."""
    logging.disable_progress_bar()
    target, processor = load_target_and_processor(target_folder, dtype.value)
    reference = copy.deepcopy(target).double()  # the weights stay rounded to `dtype`
    draft = MSDDraftModel.from_pretrained(draft_folder, dtype=target.dtype)
    num_kinds = len(VISUAL_KINDS) + len(TEXT_KINDS)
    prompts = make_evaluation_prompts(-(-generations // num_kinds), seed)
    disagreements = []
    for prompt in tqdm(random.Random(seed).sample(prompts, generations), desc="comparing"):
        inputs = build_inputs(processor, prompt.question, prompt.image).to(dtype=target.dtype)
        found = find_disagreement(target, draft, inputs, reference, max_new_tokens=max_new_tokens)
        if found is not None:
            disagreements.append(found)
    console = Console(width=100)
    console.print(f"{dtype.value}: {generations - len(disagreements)} of {generations} generations are identical")
    if disagreements:
        console.print(disagreement_table(disagreements))
    unexplained = sum(not found.is_explained for found in disagreements)
    if unexplained:
        console.print(f"{unexplained} of them differ by more than rounding explains")
        raise typer.Exit(1)


def disagreement_table(disagreements: list[Disagreement]) -> Table:
    """A table with one row for each generation that differs."""
    table = Table()
    for name in ("first difference at", "logit gap there", "rounding error there", "explained"):
        table.add_column(name, justify="right")
    for found in sorted(disagreements, key=lambda found: found.gap / found.rounding):
        table.add_row(
            str(found.position), f"{found.gap:.4f}", f"{found.rounding:.4f}", "yes" if found.is_explained else "NO"
        )
    return table


if __name__ == "__main__":
    typer.run(measure_agreement)
