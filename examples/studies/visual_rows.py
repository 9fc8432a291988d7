"""
tau where the draft reads the visual rows of many pictures: all of them, a budget (`max_visual_rows`), or none.

    python examples/studies/visual_rows.py                # questions about pictures of 36 visual tokens
    python examples/studies/visual_rows.py --world hard   # of 144 and 576

Questions about one picture. In the draft's context, and only there, that picture's rows are followed by those of
other pictures, so that the target's answer stays the one that it knows: with many more pictures in its own prompt
than it was trained with, a small target would be lost, and tau would say nothing about the draft. Outputs are compared
with those of the target alone. `--output` writes figures and a plot, which needs `pip install -e ".[bench]"`.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
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
from msd_hf.evaluation.bench_prompts import BenchPrompt
from msd_hf.loading import load_target_and_processor
from msd_hf.target.adapter import TargetPrefill
from msd_hf.toy import DRAFT_DIR, TARGET_DIR, VISUAL_KINDS
from msd_hf.toy.accuracy import make_evaluation_prompts
from msd_hf.toy.evaluate import toy_prompts
from msd_hf.toy.hard import DRAFT_DIR as HARD_DRAFT_DIR
from msd_hf.toy.hard import TARGET_DIR as HARD_TARGET_DIR
from msd_hf.toy.hard.bench_prompts import hard_prompts
from msd_hf.toy.hard.dataset import KIND_GROUPS, SampleKind


TOY, HARD = "toy", "hard"
FOLDERS = {TOY: (TARGET_DIR, DRAFT_DIR), HARD: (HARD_TARGET_DIR, HARD_DRAFT_DIR)}
HARD_SIZES: dict[SampleKind, int] = {"small": 144, "large": 576}


@dataclass
class StudyArguments:
    world: str = field(default=TOY, metadata={"choices": [TOY, HARD], "help": "The pair, and what it is asked."})
    target: str | None = field(default=None, metadata={"help": "Folder of another target."})
    drafts: str | None = field(
        default=None, metadata={"help": "Other drafts: name=folder, or several of these with commas."}
    )
    prompts_per_kind: int = field(default=4, metadata={"help": "Held-out questions of each visual kind."})
    pictures: str = field(default="1,4,16,64", metadata={"help": "Numbers of pictures in the draft's context."})
    budgets: str = field(default="all,auto,0", metadata={"help": "Values of max_visual_rows."})
    nodes: int = field(default=24, metadata={"help": "Nodes of a tree; a set size, so that tau does not vary."})
    max_new_tokens: int = field(default=96, metadata={"help": "Length limit of an answer."})
    output: str | None = field(default=None, metadata={"help": "Folder for visual_rows.json and visual_rows.png."})


@contextmanager
def more_pictures(others: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Inside the block a draft reads the rows of other pictures behind those of the prompt's own."""
    own = GrowingDrafter.prefill

    def prefill(self: GrowingDrafter, given: TargetPrefill, tokens: torch.Tensor, past: Any = None) -> None:
        own(self, extended(given, others), tokens, past)

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


def rows_of_pictures(target: Any, prompts: list[BenchPrompt]) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
            target.generate(**prompt.make_inputs(), max_new_tokens=2, assistant_model=draft)
    finally:
        GrowingDrafter.prefill = own
    return kept


def prompts_by_size(world: str, processor: Any, per_kind: int) -> dict[int, list[BenchPrompt]]:
    """Questions about one picture, by the number of its visual tokens."""
    if world == TOY:
        num_kinds = len(make_evaluation_prompts(1, 0))
        prompts = toy_prompts(processor, per_kind * num_kinds, seed=0)
        return {36: [prompt for prompt in prompts if prompt.name.split()[0] in VISUAL_KINDS]}
    kinds = KIND_GROUPS["picture"]
    return {
        size: hard_prompts(processor, per_kind * len(kinds), 0, kinds, about) for about, size in HARD_SIZES.items()
    }


def load_drafts(args: StudyArguments) -> dict[str, MSDDraftModel]:
    """The drafts by name, with trees of a set size."""
    if args.drafts is None:
        folders = {"bundled": str(FOLDERS[args.world][1])}
    else:
        folders = dict(part.split("=", 1) for part in args.drafts.split(","))
    drafts = {name: MSDDraftModel.from_pretrained(folder) for name, folder in folders.items()}
    for draft in drafts.values():
        settings = draft.generation_config
        settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = args.nodes, 6, 5
    return drafts


def rows_of(budget: str) -> Any:
    """A value of `max_visual_rows`."""
    return {"all": None, "auto": "auto"}[budget] if budget in ("all", "auto") else int(budget)


class Cells:
    """tau of each prompt, by draft, `max_visual_rows` and visual rows in the draft's context."""

    def __init__(self) -> None:
        self.taus: dict[tuple[str, str, int], list[float]] = {}
        self.num_calls = self.num_identical = 0

    def add(self, name: str, budget: str, rows: int, tau: float, is_identical: bool) -> None:
        self.taus.setdefault((name, budget, rows), []).append(tau)
        self.num_calls += 1
        self.num_identical += is_identical

    def mean(self, name: str, budget: str, rows: int) -> tuple[float, float]:
        """The mean, and the half-width of its 95% interval."""
        taus = self.taus[name, budget, rows]
        return float(numpy.mean(taus)), float(1.96 * numpy.std(taus, ddof=1) / len(taus) ** 0.5)


def measure(target: Any, drafts: dict[str, MSDDraftModel], sizes: dict[int, list[BenchPrompt]], args: Any) -> Cells:
    cells = Cells()
    numbers = [int(number) for number in args.pictures.split(",")]
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    for size, prompts in sizes.items():
        pool = rows_of_pictures(target, prompts)
        # Only the largest picture is followed by others: the number of rows matters, not that of pictures.
        counts = numbers if size == max(sizes) else numbers[:1]
        for place, prompt in enumerate(tqdm(prompts, desc=f"questions, {size} visual tokens")):
            inputs = prompt.make_inputs()
            alone = target.generate(**inputs, **options)
            others = [rows for index, rows in enumerate(pool) if index != place]
            random.Random(place).shuffle(others)
            for number in counts:
                chosen = [others[index % len(others)] for index in range(number - 1)]
                for name, draft in drafts.items():
                    for budget in args.budgets.split(","):
                        draft.generation_config.max_visual_rows = rows_of(budget)
                        with more_pictures(chosen):
                            output = target.generate(
                                **inputs, **options, assistant_model=draft, return_dict_in_generate=True
                            )
                        tau = mean_acceptance_length(output.acceptance_lengths)
                        cells.add(name, budget, size * number, tau, torch.equal(output.sequences, alone))
    return cells


def print_cells(cells: Cells, console: Console) -> None:
    rows = sorted({rows for _, _, rows in cells.taus})
    table = Table(title="tau by visual rows in the draft's context: mean (half-width of 95%)")
    for name in ("draft", "max_visual_rows", *map(str, rows)):
        table.add_column(name, justify="right")
    for name, budget in dict.fromkeys((name, budget) for name, budget, _ in cells.taus):
        figures = [cells.mean(name, budget, count) for count in rows]
        table.add_row(name, budget, *(f"{mean:.2f} ({width:.2f})" for mean, width in figures))
    console.print(table)
    num_prompts = len(next(iter(cells.taus.values())))
    console.print(
        f"{num_prompts} questions a cell; identical to the target alone: {cells.num_identical} of {cells.num_calls}"
    )


def write_cells(cells: Cells, folder: Path) -> None:
    """Writes the figures and a plot."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figures = [
        {"draft": name, "max_visual_rows": budget, "rows": rows, "tau": taus}
        for (name, budget, rows), taus in cells.taus.items()
    ]
    (folder / "visual_rows.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    plot, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = dict(zip(dict.fromkeys(name for name, _, _ in cells.taus), "-:", strict=False))
    colours = {budget: f"C{number}" for number, budget in enumerate(dict.fromkeys(b for _, b, _ in cells.taus))}
    for name, budget in dict.fromkeys((name, budget) for name, budget, _ in cells.taus):
        rows = sorted(count for own, value, count in cells.taus if (own, value) == (name, budget))
        means, widths = zip(*(cells.mean(name, budget, count) for count in rows), strict=True)
        axis.errorbar(
            rows, means, widths, linestyle=styles[name], color=colours[budget], capsize=2, label=f"{name}: {budget}"
        )
    axis.set_xscale("log")
    axis.set_xlabel("visual rows in the draft's context")
    axis.set_ylabel("tau")
    axis.set_ylim(bottom=1)
    axis.legend(title="draft: max_visual_rows")
    plot.savefig(folder / "visual_rows.png", dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses()
    target, processor = load_target_and_processor(args.target or FOLDERS[args.world][0])
    cells = measure(target, load_drafts(args), prompts_by_size(args.world, processor, args.prompts_per_kind), args)
    console = Console(width=160)
    print_cells(cells, console)
    if args.output is not None:
        write_cells(cells, Path(args.output))
        console.print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
