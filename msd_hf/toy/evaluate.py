"""Measures tau, speedup and agreement of the toy pair: `python -m msd_hf.toy.evaluate`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils import logging

from ..draft.modeling_msd import MSDDraftModel
from ..evaluation import Comparison, compare, mean_acceptance_length
from ..evaluation.bench_prompts import BenchPrompt
from ..loading import load_target_and_processor
from ..prompts import build_inputs
from ..tree.settings import TreeSettings
from . import DRAFT_DIR, TARGET_DIR
from .accuracy import make_evaluation_prompts


def evaluate_pair(
    target_folder: Annotated[Path, typer.Option("--target", help="Folder of the target.")] = TARGET_DIR,
    draft_folder: Annotated[Path, typer.Option("--draft", help="Folder of the draft.")] = DRAFT_DIR,
    prompts_per_kind: Annotated[int, typer.Option(min=1, help="Held-out questions of each kind.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 140,
    repeats: Annotated[int, typer.Option(min=1, help="Runs with and without the draft per question, in turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
) -> None:
    """Run `generate` with and without the draft, in turns, on the test split, and compare outputs and times."""
    logging.disable_progress_bar()
    target, processor = load_target_and_processor(target_folder)
    draft = MSDDraftModel.from_pretrained(draft_folder)
    groups: dict[str, list[Comparison]] = defaultdict(list)
    prompts = make_evaluation_prompts(prompts_per_kind, seed)
    warm_up = build_inputs(processor, prompts[0].question, prompts[0].image)
    compare(target, draft, warm_up, max_new_tokens=16)
    for prompt in tqdm(prompts, desc="comparing"):
        inputs = build_inputs(processor, prompt.question, prompt.image)
        comparison = compare(target, draft, inputs, repeats, max_new_tokens=max_new_tokens, do_sample=False)
        for name in (f"{prompt.sample_kind}: {prompt.kind}", f"all {prompt.sample_kind}", "all"):
            groups[name].append(comparison)
    tree = TreeSettings.from_generation_config(draft.generation_config)
    console = Console(width=100)
    console.print(
        f"{target.dtype}, {torch.get_num_threads()} threads, trees of {'at most ' * tree.is_auto}{tree.num_nodes} "
        f"nodes, depth {tree.depth}, top-k {tree.top_k}"
    )
    console.print(comparison_table(groups))


def toy_prompts(processor: Any, num_prompts: int, seed: int) -> list[BenchPrompt]:
    """Makes `num_prompts` held-out questions for a benchmark. The kinds of questions take turns."""
    num_kinds = len(make_evaluation_prompts(1, seed))
    per_kind = -(-num_prompts // num_kinds)
    by_kind = make_evaluation_prompts(per_kind, seed)
    prompts = [prompt for number in range(per_kind) for prompt in by_kind[number::per_kind]]
    return [
        BenchPrompt(
            f"{prompt.kind} {number}",
            prompt.sample_kind,
            partial(build_inputs, processor, prompt.question, prompt.image),
            prompt.question,
            () if prompt.image is None else (prompt.image,),
        )
        for number, prompt in enumerate(prompts[:num_prompts])
    ]


def comparison_table(groups: dict[str, list[Comparison]]) -> Table:
    """A table with one row for each group of prompts: tokens per answer, tau, median speedup, identical outputs."""
    table = Table()
    for name in ("questions", "number", "tokens", "tau", "speedup", "identical"):
        table.add_column(name, justify="left" if name == "questions" else "right")
    for name, comparisons in sorted(groups.items(), key=lambda item: (item[0].startswith("all"), item[0] == "all")):
        table.add_row(
            name,
            str(len(comparisons)),
            f"{sum(len(c.vanilla[0].tokens) for c in comparisons) / len(comparisons):.1f}",
            f"{mean_acceptance_length(c.runs['tree'][0].acceptance_lengths for c in comparisons):.2f}",
            f"{statistics.median(c.speedup() for c in comparisons):.2f}",
            f"{sum(c.identical() for c in comparisons)}/{len(comparisons)}",
        )
    return table


if __name__ == "__main__":
    typer.run(evaluate_pair)
