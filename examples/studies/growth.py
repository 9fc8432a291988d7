"""
How the cost of a round grows with context, rows and nodes, in units of one step of `generate`.

    python examples/studies/growth.py --output growth

Random weights of one shape, prompts of random tokens, trees of set sizes with the original's depth and top-k (5 and
10). Almost no candidate is accepted, so a round costs what its size costs. A step of `generate` and rounds of all
sizes take turns. Writes `growth.json`, `growth.md` (a table with medians and quartiles, and the parts of a round) and
`growth.png`. Sizes for which there is no memory are named and left out.

The original's own settings on the bundled pair, as one line with target forward, drafting and the rest:

    python examples/studies/growth.py --toy --contexts 100 --rows 1 --nodes 59 --output original

Needs an otherwise idle machine.
"""

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, Cache, HfArgumentParser

from msd_hf import MSDDraftModel
from msd_hf.evaluation.intercepted_loop import LoopEnd, run_intercepted
from msd_hf.evaluation.phase_timer import PhaseTimer
from msd_hf.evaluation.plots import check_matplotlib
from msd_hf.evaluation.round_timing import RoundTiming
from msd_hf.evaluation.shapes import build_pair, shape_config
from msd_hf.evaluation.timed_run import timed_generate
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.tree.candidate import CandidateTree
from msd_hf.writing.saving import replace_text, replaced_file


TREE_DEPTH, TREE_TOP_K = 5, 10
# The parts of `RoundTiming`, in three groups.
GROUPS = {"target forward": ("target forward",), "drafting": ("draft layers", "draft head", "tree building")}
REST = "rest"


@dataclass
class GrowthArguments:
    output: str = field(metadata={"help": "Folder of the results."})
    contexts: str = field(default="500,2000,8000,32000", metadata={"help": "Tokens of a prompt."})
    rows: str = field(default="1,4,16,32", metadata={"help": "Rows of a batch."})
    nodes: str = field(default="1,4,16,32,59,128", metadata={"help": "Nodes of a tree, the root included."})
    shape: str = field(default="small", metadata={"help": "A shape of `msd-hf bench --shape`, with random weights."})
    toy: bool = field(default=False, metadata={"help": "The bundled pair, in place of a shape."})
    rounds: int = field(default=8, metadata={"help": "Rounds, or steps of `generate`, of each measurement."})
    repeats: int = field(default=5, metadata={"help": "Measurements of each size, in turns, after one that warms up."})
    threads: int = field(default=2, metadata={"help": "Threads."})
    device: str = field(default="cpu", metadata={"help": "Device."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of both models."})


def load_pair(args: GrowthArguments, longest: int) -> tuple[Any, MSDDraftModel]:
    """The pair, with room for the longest text, whose target never ends an answer."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if args.toy:
        target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR, dtype=dtype).to(device)
        draft = MSDDraftModel.from_pretrained(DRAFT_DIR, dtype=dtype).to(device)
        target.generation_config.eos_token_id = None
        return target, draft
    config = shape_config(args.shape)
    text_config = config.get_text_config(decoder=True)
    text_config.max_position_embeddings = max(text_config.max_position_embeddings, longest)
    return build_pair(config, dtype, device)


def make_inputs(target: Any, context: int, num_rows: int) -> dict[str, torch.Tensor]:
    """A batch of prompts of random tokens, none of which stands for an image."""
    torch.manual_seed(context)
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(10, vocab_size, (num_rows, context))
    for name in ("image_token_id", "video_token_id"):
        ids[ids == getattr(target.config, name, None)] = 9
    ids = ids.to(target.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(
    target: Any, draft: MSDDraftModel, inputs: dict[str, torch.Tensor], nodes: Sequence[int], args: GrowthArguments
) -> list[dict[str, Any]]:
    """Measures one context and number of rows, with all sizes of trees in turns."""
    steps: list[float] = []
    rounds: dict[int, list[float]] = defaultdict(list)
    parts: dict[int, list[RoundTiming]] = defaultdict(list)
    settings = draft.generation_config
    arguments: dict[str, Any] = {"max_new_tokens": args.rounds + 1, "do_sample": False}
    for repeat in range(args.repeats + 1):
        seconds = timed_generate(target, inputs, **arguments).decode_seconds / args.rounds
        if repeat:
            steps.append(seconds)
        for number in nodes:
            settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = number, TREE_DEPTH, TREE_TOP_K
            timing = timed_rounds(target, draft, inputs, args.rounds)
            if repeat:
                rounds[number].append(timing.loop_seconds / args.rounds)
                parts[number].append(timing)
    rows = []
    for number in nodes:
        total = RoundTiming.total(parts[number])
        shares = {name: sum(total.seconds[part] for part in group) for name, group in GROUPS.items()}
        shares[REST] = total.loop_seconds - sum(shares.values())
        step = statistics.median(steps)
        rows.append(
            {
                "context": inputs["input_ids"].shape[1],
                "rows": inputs["input_ids"].shape[0],
                "nodes": number,
                "step_milliseconds": 1e3 * step,
                "steps": quartiles([round_ / step_ for round_, step_ in zip(rounds[number], steps, strict=True)]),
                "parts_in_steps": {name: part / total.num_rounds / step for name, part in shares.items()},
            }
        )
    return rows


def timed_rounds(target: Any, draft: MSDDraftModel, inputs: dict[str, torch.Tensor], num_rounds: int) -> RoundTiming:
    """The time of rounds, each from the beginning of a verification to the beginning of the next."""
    timer, num_verified = PhaseTimer(target.device), 0

    def on_verify(verify: Callable[[CandidateTree], Any], tree: CandidateTree, cache: Cache) -> Any:
        nonlocal num_verified
        if num_verified == 0:  # the first tree belongs to no round: nothing was accepted before it
            timer.clear()
        elif num_verified == num_rounds:
            raise LoopEnd
        num_verified += 1
        return verify(tree)

    with timer:
        run_intercepted(target, draft, inputs, on_verify, new_tokens(num_rounds))
        return RoundTiming.from_phases(timer.inside("decode"), num_rounds)


def new_tokens(num_rounds: int) -> int:
    """More tokens than the rounds emit: near the length limit, trees get smaller."""
    return (num_rounds + 2) * (TREE_DEPTH + 2)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the results."""
    lines = [
        "| context | rows | nodes | step of `generate` (ms) | round in steps (quartiles) "
        "| target forward | drafting | rest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lower, median, upper = row["steps"]
        cells = [f"{row['context']:,}", row["rows"], row["nodes"], f"{row['step_milliseconds']:.1f}"]
        cells += [
            f"{median:.2f} ({lower:.2f}-{upper:.2f})",
            *(f"{part:.2f}" for part in row["parts_in_steps"].values()),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a number of rows, one line a context: the cost of a round by its nodes, with quartiles."""
    from matplotlib.figure import Figure

    batches = sorted({row["rows"] for row in rows})
    figure = Figure(figsize=(3.6 * len(batches) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, num_rows in zip(panels, batches, strict=True):
        for context in sorted({row["context"] for row in rows}):
            of_line = [row for row in rows if row["rows"] == num_rows and row["context"] == context]
            if not of_line:
                continue
            nodes = [row["nodes"] for row in of_line]
            lower, median, upper = zip(*(row["steps"] for row in of_line), strict=True)
            (line,) = panel.plot(nodes, median, marker="o", markersize=3, label=f"{context:,} tokens")
            panel.fill_between(nodes, lower, upper, alpha=0.2, color=line.get_color())
        panel.set_xscale("log", base=2)
        panel.set_title(f"{num_rows} row{'s' * (num_rows > 1)}")
        panel.set_xlabel("nodes of a tree")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("round, in steps of generate")
    panels[0].legend(fontsize=8)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    (args,) = HfArgumentParser(GrowthArguments, description=__doc__).parse_args_into_dataclasses()
    check_matplotlib("this study")
    torch.set_num_threads(args.threads)
    contexts, batches, nodes = numbers(args.contexts), numbers(args.rows), numbers(args.nodes)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    target, draft = load_pair(args, max(contexts) + new_tokens(args.rounds) + max(nodes))
    rows: list[dict[str, Any]] = []
    for context, num_rows in tqdm(list(itertools.product(contexts, batches)), desc="sizes"):
        try:
            rows += measure(target, draft, make_inputs(target, context, num_rows), nodes, args)
        except (torch.OutOfMemoryError, MemoryError):
            print(f"No memory for {num_rows} rows of {context:,} tokens.")
            continue
        # After each size, because a run of all sizes takes long.
        replace_text(folder / "growth.json", json.dumps({"settings": vars(args), "rows": rows}, indent=1) + "\n")
        replace_text(folder / "growth.md", as_markdown(rows))
        draw(rows, folder / "growth.png")
    Console(width=120).print(Markdown(as_markdown(rows)))


if __name__ == "__main__":
    main()
