"""
tau where the draft reads the visual rows of many pictures: all of them, a budget (`max_visual_rows`), or none.

    python examples/studies/visual_rows.py

Toy questions about one picture. In the draft's context, and only there, that picture's rows are followed by those of
other pictures, so that the target's answer stays the one that it knows: with several pictures in its own prompt, the
target of the toy pair would be lost, and tau would say nothing about the draft. Outputs are compared with those of the
target alone.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from msd_hf import MSDDraftModel
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.evaluation import mean_acceptance_length
from msd_hf.loading import load_target_and_processor
from msd_hf.prompts import build_inputs
from msd_hf.target.adapter import TargetPrefill
from msd_hf.toy import DRAFT_DIR, TARGET_DIR, VISUAL_KINDS, make_prompts


ROWS = 36  # of one picture of the toy world


@dataclass
class StudyArguments:
    target: str = field(default=str(TARGET_DIR), metadata={"help": "Folder of the target."})
    draft: str = field(default=str(DRAFT_DIR), metadata={"help": "Folder of the draft."})
    prompts_per_kind: int = field(default=4, metadata={"help": "Held-out questions of each visual kind."})
    pictures: str = field(default="1,4,16,64", metadata={"help": "Numbers of pictures in the draft's context."})
    budgets: str = field(default="all,36,0", metadata={"help": "Values of max_visual_rows."})
    nodes: int = field(default=24, metadata={"help": "Nodes of a tree; a set size, so that tau does not vary."})
    max_new_tokens: int = field(default=96, metadata={"help": "Length limit of an answer."})


@contextmanager
def more_pictures(others: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Inside the block a draft reads the rows of other pictures behind those of the prompt's own."""
    own = GrowingDrafter.prefill

    def prefill(self: GrowingDrafter, given: TargetPrefill, tokens: torch.Tensor, past: Any = None) -> None:
        own(self, extended(given, others), tokens, None)

    GrowingDrafter.prefill = prefill
    try:
        yield
    finally:
        GrowingDrafter.prefill = own


def extended(given: TargetPrefill, others: list[tuple[torch.Tensor, torch.Tensor]]) -> TargetPrefill:
    """A prefill with further visual rows behind the last one."""
    end = int(given.visual_mask[0].nonzero().max()) + 1
    embeds, states = [given.inputs_embeds[:, :end]], [given.hidden_states[:, :end]]
    embeds += [embed for embed, _ in others]
    states += [state for _, state in others]
    count = sum(embed.shape[1] for embed, _ in others)
    mask = given.visual_mask
    visual = torch.cat([mask[:, :end], mask.new_ones(1, count), mask[:, end:]], dim=1)
    return TargetPrefill(
        logits=given.logits,
        inputs_embeds=torch.cat([*embeds, given.inputs_embeds[:, end:]], dim=1),
        hidden_states=torch.cat([*states, given.hidden_states[:, end:]], dim=1),
        visual_mask=visual,
        prompt_mask=None,
        next_position=given.next_position + count,
        num_slots=given.num_slots + count,
        outputs=given.outputs,
    )


def rows_of_pictures(target: Any, processor: Any, prompts: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and last hidden states of the visual rows of each prompt's picture."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = GrowingDrafter.prefill

    def keep(self: GrowingDrafter, given: TargetPrefill, tokens: torch.Tensor, past: Any = None) -> None:
        mask = given.visual_mask[0]
        kept.append((given.inputs_embeds[:, mask].clone(), given.hidden_states[:, mask].clone()))
        own(self, given, tokens, past)

    GrowingDrafter.prefill = keep
    try:
        draft = MSDDraftModel.from_target(target).eval()
        for prompt in prompts:
            target.generate(
                **build_inputs(processor, prompt.question, prompt.image), max_new_tokens=2, assistant_model=draft
            )
    finally:
        GrowingDrafter.prefill = own
    return kept


def main() -> None:
    (args,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses()
    target, processor = load_target_and_processor(args.target)
    draft = MSDDraftModel.from_pretrained(args.draft)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = args.nodes, 6, 5
    prompts = [prompt for kind in VISUAL_KINDS for prompt in make_prompts("test", args.prompts_per_kind, 0, kind)]
    pool = rows_of_pictures(target, processor, prompts)
    numbers = [int(number) for number in args.pictures.split(",")]
    budgets = args.budgets.split(",")
    taus: dict[tuple[str, int], list[float]] = {(budget, number): [] for budget in budgets for number in numbers}
    num_calls = num_identical = 0
    for place, prompt in enumerate(tqdm(prompts, desc="questions")):
        inputs = build_inputs(processor, prompt.question, prompt.image)
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        alone = target.generate(**inputs, **options)
        others = [rows for index, rows in enumerate(pool) if index != place]
        random.Random(place).shuffle(others)
        for number in numbers:
            chosen = [others[index % len(others)] for index in range(number - 1)]
            for budget in budgets:
                settings.max_visual_rows = None if budget == "all" else int(budget)
                with more_pictures(chosen):
                    output = target.generate(**inputs, **options, assistant_model=draft, return_dict_in_generate=True)
                taus[budget, number].append(mean_acceptance_length(output.acceptance_lengths))
                num_calls += 1
                num_identical += torch.equal(output.sequences, alone)
    table = Table(title=f"tau by pictures of {ROWS} rows in the draft's context: mean (half-width of 95%)")
    for name in ("max_visual_rows", *map(str, numbers)):
        table.add_column(name, justify="right")
    for budget in budgets:
        cells = [taus[budget, number] for number in numbers]
        widths = [1.96 * numpy.std(cell, ddof=1) / len(cell) ** 0.5 for cell in cells]
        table.add_row(
            budget, *(f"{numpy.mean(cell):.2f} ({width:.2f})" for cell, width in zip(cells, widths, strict=True))
        )
    console = Console()
    console.print(table)
    console.print(f"{len(prompts)} questions a cell; identical to the target alone: {num_identical} of {num_calls}")


if __name__ == "__main__":
    main()
