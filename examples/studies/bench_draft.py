"""
Milliseconds of drafting one tree: the draft's layers, the head, and the rest, with the full head and with the head of
a draft vocabulary. The baseline is the same forwards of the layers and calls of the full head, without anything else,
in turns in the same run.

    python examples/studies/bench_draft.py --threads 1 --draft-vocab 8000

Drafting is the part of a round before the verification: the draft reads the accepted tokens with the target's hidden
states, then the tree grows level by level. That takes `depth + 1` forwards of the layers and as many calls of the
head.
"""

import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import Cache, HfArgumentParser
from transformers.utils import ModelOutput

from msd_hf.attention.masks import tree_attention_mask
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.drafting.step import DraftingStep
from msd_hf.evaluation.clock import synchronize
from msd_hf.evaluation.phase_timer import PhaseTimer
from msd_hf.evaluation.shapes import build_pair, small_config
from msd_hf.kv.in_place import InPlaceLayer, truncate
from msd_hf.kv.slots import ContextSlots
from msd_hf.loading import parse_device, parse_dtype
from msd_hf.observer import phase
from msd_hf.target.adapter import TargetAdapter, TargetPrefill
from msd_hf.tree.settings import TreeSettings


WARM_UP = 2


@dataclass
class BenchArguments:
    hidden: int = field(default=1024, metadata={"help": "Hidden size."})
    heads: int = field(default=16, metadata={"help": "Attention heads."})
    intermediate: int = field(default=2816, metadata={"help": "Width of the MLP."})
    vocabulary: int = field(default=32000, metadata={"help": "Vocabulary."})
    draft_vocab: int = field(default=8000, metadata={"help": "Tokens of the draft's own vocabulary; 0 for none."})
    context: int = field(default=700, metadata={"help": "Tokens before the tree."})
    nodes: int = field(default=59, metadata={"help": "Nodes of the tree, the root included."})
    depth: int = field(default=5, metadata={"help": "Expansions after the first."})
    top_k: int = field(default=10, metadata={"help": "Candidates of each node, and nodes expanded at each level."})
    accepted: int = field(default=4, metadata={"help": "Tokens that the previous round emitted."})
    repeats: int = field(default=20, metadata={"help": "Trees of each kind, in turns."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "Device; auto: the GPU if there is one."})


class BareForwards:
    """The baseline: forwards of the draft and calls of the full head, with all inputs prepared beforehand."""

    def __init__(self, args: BenchArguments, adapter: TargetAdapter, draft):
        self.adapter, self.context = adapter, args.context
        self.step = DraftingStep(draft)
        self.cache = Cache(layers=[InPlaceLayer() for _ in draft.layers])
        draft(random_states(draft, args.context), random_states(draft, args.context), past_key_values=self.cache)
        slots = ContextSlots([args.context])
        self.calls = []
        past = args.context
        for rows in [args.accepted] + [args.top_k] * args.depth:
            visible = torch.ones(1, rows, past - args.context + rows, dtype=torch.bool, device=draft.device)
            self.calls.append(
                {
                    "inputs_embeds": random_states(draft, rows),
                    "hidden_states": random_states(draft, rows),
                    "attention_mask": tree_attention_mask(visible, slots, draft.dtype),
                    "position_ids": torch.full((1, rows), past, device=draft.device),
                    "last_position": past,
                }
            )
            past += rows
        self.head_inputs = [random_states(draft, rows) for rows in [1] + [args.top_k] * args.depth]

    def layers(self) -> None:
        for call in self.calls:
            self.step(**call, cache=self.cache)

    def head(self) -> None:
        for states in self.head_inputs:
            self.adapter.head(states)

    def reset(self) -> None:
        truncate(self.cache, self.context)


class Drafting:
    """Drafting as in the rounds of the decoding loop."""

    def __init__(self, args: BenchArguments, adapter: TargetAdapter, draft):
        self.drafter = GrowingDrafter(draft, adapter, best_path_first=True)
        self.settings = TreeSettings(args.nodes, args.depth, args.top_k)
        self.tokens = torch.randint(args.vocabulary, (1, args.accepted), device=draft.device)
        self.roots = self.tokens[:, -1].clone()
        self.hidden_states = random_states(draft, args.accepted)
        # Each tree adds accepted tokens, so that the context starts shorter and has the wanted length on average.
        length = max(1, args.context - args.accepted * (args.repeats + WARM_UP))
        prefill = TargetPrefill(
            logits=torch.empty(0),
            inputs_embeds=random_states(draft, length),
            hidden_states=random_states(draft, length),
            visual_mask=torch.zeros(1, length, dtype=torch.bool, device=draft.device),
            prompt_mask=None,
            next_position=torch.tensor([[length]], device=draft.device),
            num_slots=length,
            outputs=ModelOutput(),
        )
        self.drafter.prefill(prefill, torch.tensor([1], device=draft.device))

    def __call__(self) -> None:
        with phase("decode"):
            self.drafter.accept(self.tokens, self.hidden_states, [self.tokens.shape[1]])
            self.drafter.propose(self.roots, self.settings)

    def measure(self, device: torch.device) -> dict[str, float]:
        """Milliseconds of one tree without the phase timer (`all`), and of the phases of another tree."""
        all_of_it = timed(self, device)
        with PhaseTimer(device) as timer:
            self()
        phases = {name: 1e3 * seconds for name, seconds in timer.inside("decode").items()}
        layers, head = phases.pop("draft forward"), phases.pop("draft head")
        return {"layers": layers, "head": head, "the rest": sum(phases.values()), "all": all_of_it}


def random_states(draft, rows: int) -> torch.Tensor:
    return torch.randn(1, rows, draft.config.hidden_size, device=draft.device, dtype=draft.dtype)


def timed(function, device: torch.device) -> float:
    """Milliseconds of a call."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    device = parse_device(args.device)
    # One layer: only the embedding and the head of the target are used.
    config = small_config(args.hidden, args.intermediate, args.heads, args.vocabulary, num_layers=1)
    target, draft = build_pair(config, parse_dtype(args.dtype), device)
    adapter = TargetAdapter(target)
    drafting = {"full head": Drafting(args, adapter, draft)}
    if args.draft_vocab:
        short = copy.deepcopy(draft)
        short.set_draft_vocab(torch.randperm(args.vocabulary)[: args.draft_vocab])
        drafting[f"head of {args.draft_vocab:,}"] = Drafting(args, adapter, short)
    bare = BareForwards(args, adapter, draft)

    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*drafting, "bare")}
    for _ in range(args.repeats + WARM_UP):
        for name, draft_tree in drafting.items():
            rows[name].append(draft_tree.measure(device))
        layers, head = timed(bare.layers, device), timed(bare.head, device)
        rows["bare"].append({"layers": layers, "head": head, "the rest": 0.0, "all": layers + head})
        bare.reset()
    rows = {name: measured[WARM_UP:] for name, measured in rows.items()}

    console = Console(width=100)
    console.print(
        f"Drafting a tree: hidden {args.hidden}, vocabulary {args.vocabulary:,}, context {args.context}, "
        f"{args.nodes} nodes, depth {args.depth}, top-k {args.top_k}, {args.dtype}, {args.threads} threads"
    )
    table = Table(title=f"ms: median (least) of {args.repeats}")
    columns = ("layers", "head", "the rest", "all")
    for name in ("", *columns, "to bare"):
        table.add_column(name, justify="right" if name else "left")
    for name, measured in rows.items():
        cells = [f"{summary(row[column] for row in measured)}" for column in columns]
        ratios = [row["all"] / base["all"] for row, base in zip(measured, rows["bare"], strict=True)]
        least = min(row["all"] for row in measured) / min(row["all"] for row in rows["bare"])
        table.add_row(name, *cells, f"{statistics.median(ratios):.2f} ({least:.2f})")
    console.print(table)
    console.print("to bare: median of the ratios in a turn, and the ratio of the least times")


def summary(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):.1f} ({min(values):.1f})"


if __name__ == "__main__":
    main()
