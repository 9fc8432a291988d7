"""
Drafting one tree: milliseconds of the draft's layers, of the head and of everything else, and their ratio to the same
layer forwards and full head calls timed bare in the same run.

    python examples/bench_draft.py --threads 1

Drafting is what a round does besides verifying: the accepted tokens are fed with the target's hidden states, then the
tree grows level by level. That is `depth + 1` forwards of the layers and as many calls of the head.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import Cache, HfArgumentParser

from msd_hf.cache import InPlaceLayer, truncate
from msd_hf.candidate_generator import MSDCandidateGenerator
from msd_hf.evaluation.shapes import build_pair, shape_config
from msd_hf.phases import PhaseTimer, phase
from msd_hf.targets import TargetAdapter, TargetPrefill
from msd_hf.tree import TreeSettings, tree_attention_mask


@dataclass
class BenchArguments:
    hidden: int = field(default=1024, metadata={"help": "Hidden size."})
    heads: int = field(default=16, metadata={"help": "Attention heads."})
    intermediate: int = field(default=2816, metadata={"help": "Width of the MLP."})
    vocabulary: int = field(default=32000, metadata={"help": "Vocabulary."})
    context: int = field(default=700, metadata={"help": "Tokens before the tree."})
    nodes: int = field(default=59, metadata={"help": "Nodes of the tree, the root included."})
    depth: int = field(default=5, metadata={"help": "Expansions after the first."})
    top_k: int = field(default=10, metadata={"help": "Candidates a node, and nodes expanded a level."})
    accepted: int = field(default=4, metadata={"help": "Tokens that the round before emitted."})
    repeats: int = field(default=20, metadata={"help": "Trees, of which medians count."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Device."})


class BareForwards:
    """The same forwards of the draft and calls of the full head, with everything else prepared beforehand."""

    def __init__(self, args: BenchArguments, adapter: TargetAdapter, draft):
        self.adapter, self.draft, self.context = adapter, draft, args.context
        self.cache = Cache(layers=[InPlaceLayer() for _ in draft.layers])
        self.calls = []
        past = args.context
        for rows in [args.accepted] + [args.top_k] * args.depth:
            visible = torch.ones(1, rows, past - args.context + rows, dtype=torch.bool, device=draft.device)
            self.calls.append(
                {
                    "inputs_embeds": random_states(draft, rows),
                    "hidden_states": random_states(draft, rows),
                    "attention_mask": tree_attention_mask(visible, args.context, draft.dtype),
                    "position_ids": torch.full((1, rows), past, device=draft.device),
                }
            )
            past += rows
        self.head_inputs = [random_states(draft, rows) for rows in [1] + [args.top_k] * args.depth]
        draft(random_states(draft, args.context), random_states(draft, args.context), past_key_values=self.cache)

    def layers(self) -> None:
        for call in self.calls:
            self.draft(**call, past_key_values=self.cache)

    def head(self) -> None:
        for states in self.head_inputs:
            self.adapter.head(states)

    def reset(self) -> None:
        truncate(self.cache, self.context)


def random_states(draft, rows: int) -> torch.Tensor:
    return torch.randn(1, rows, draft.config.hidden_size, device=draft.device, dtype=draft.dtype)


def timed(function, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = shape_config("small")
    text = config.text_config
    text.num_hidden_layers = 1  # only the target's embedding and head are used
    text.hidden_size, text.intermediate_size, text.vocab_size = args.hidden, args.intermediate, args.vocabulary
    text.num_attention_heads = text.num_key_value_heads = args.heads
    text.head_dim = args.hidden // args.heads
    target, draft = build_pair(config, getattr(torch, args.dtype), device)
    adapter = TargetAdapter(target)
    settings = TreeSettings(args.nodes, args.depth, args.top_k)

    generator = MSDCandidateGenerator(draft, adapter)
    # Each tree adds accepted tokens: the context is right in the middle of the run.
    length = max(1, args.context - args.accepted * args.repeats // 2)
    generator.prefill(
        TargetPrefill(
            logits=torch.empty(0),
            inputs_embeds=random_states(draft, length),
            hidden_states=random_states(draft, length),
            visual_mask=torch.zeros(1, length, dtype=torch.bool, device=device),
            prompt_mask=None,
            next_position=torch.tensor([[length]], device=device),
        ),
        torch.tensor([1], device=device),
    )
    bare = BareForwards(args, adapter, draft)

    def draft_tree() -> None:
        with phase("decode"):
            generator.accept(tokens, random_hidden_states)
            generator.propose(tokens[:, -1], settings)

    tokens = torch.randint(args.vocabulary, (1, args.accepted), device=device)
    random_hidden_states = random_states(draft, args.accepted)
    rows: list[dict[str, float]] = []
    for repeat in range(args.repeats + 2):
        row = {"tree": timed(draft_tree, device)}
        with PhaseTimer(device) as timer:
            draft_tree()
        phases = {name: 1e3 * seconds for name, seconds in timer.inside("decode").items()}
        row["layers"], row["head"] = phases.pop("draft forward"), phases.pop("draft head")
        row["rest"] = sum(phases.values())
        row["bare layers"] = timed(bare.layers, device)
        row["bare head"] = timed(bare.head, device)
        bare.reset()
        if repeat >= 2:
            rows.append(row)

    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratio = statistics.median(row["tree"] / (row["bare layers"] + row["bare head"]) for row in rows)
    console = Console(width=100)
    console.print(
        f"Drafting a tree: hidden {args.hidden}, vocabulary {args.vocabulary:,}, context {args.context}, "
        f"{args.nodes} nodes, depth {args.depth}, top-k {args.top_k}, {args.dtype}, {args.threads} threads"
    )
    table = Table()
    for name in ("ms", "layers", "head", "the rest", "all"):
        table.add_column(name, justify="left" if name == "ms" else "right")
    table.add_row("drafting", *(f"{median[name]:.1f}" for name in ("layers", "head", "rest", "tree")))
    bare_total = median["bare layers"] + median["bare head"]
    table.add_row("bare", f"{median['bare layers']:.1f}", f"{median['bare head']:.1f}", "", f"{bare_total:.1f}")
    console.print(table)
    console.print(f"ratio of drafting to the bare layers and full head: {ratio:.2f} (median of {len(rows)} pairs)")


if __name__ == "__main__":
    main()
