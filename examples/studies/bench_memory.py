"""
The memory that draft and tree add to the peak of `generate` alone. The limit is the draft's weights, its keys and
values, and the keys and values of 64 slots of the target, plus a tenth.

    python examples/studies/bench_memory.py --context 1000 --new-tokens 128

The weights are random. Hardly any candidate is accepted, so that there are about as many rounds as new tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from msd_hf.errors import MSDError
from msd_hf.evaluation.shape_bench import slot_bytes
from msd_hf.evaluation.shapes import build_pair, random_prompt, small_config
from msd_hf.loading import parse_device, parse_dtype


TARGET_SLOTS = 64
TOLERANCE = 0.1


@dataclass
class BenchArguments:
    hidden: int = field(default=1024, metadata={"help": "Hidden size."})
    heads: int = field(default=16, metadata={"help": "Attention heads."})
    intermediate: int = field(default=2816, metadata={"help": "Width of the MLP."})
    layers: int = field(default=16, metadata={"help": "Decoder layers of the target."})
    vocabulary: int = field(default=32000, metadata={"help": "Vocabulary."})
    context: int = field(default=1000, metadata={"help": "Tokens of the prompt."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens of the answer."})
    limit: int = field(
        default=0, metadata={"help": "`max_new_tokens`, if answers shall end earlier; 0: the same as --new-tokens."}
    )
    nodes: int = field(default=59, metadata={"help": "Nodes of the tree, the root included."})
    depth: int = field(default=5, metadata={"help": "Expansions after the first."})
    top_k: int = field(default=10, metadata={"help": "Candidates of each node, and nodes expanded at each level."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "Device; auto: the GPU if there is one."})

    def __post_init__(self) -> None:
        if self.limit and self.limit < self.new_tokens:
            raise MSDError(f"--limit {self.limit} is below --new-tokens {self.new_tokens}.")


def peak_bytes(function: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """The peak of the bytes that tensors made by `function` hold, and the result of `function`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    # The resident memory also includes freed memory that the system's allocator keeps, which differs from run to run.
    # The profiler records each allocation of a tensor, also inside an operation.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result


def ends_at(length: int) -> Callable[..., torch.Tensor]:
    def has_ended(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= length, device=input_ids.device)

    return has_ended


@torch.no_grad()
def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    device = parse_device(args.device)
    config = small_config(args.hidden, args.intermediate, args.heads, args.vocabulary, args.layers)
    target, draft = build_pair(config, parse_dtype(args.dtype), device)
    draft.generation_config.update(num_assistant_tokens=args.nodes, tree_depth=args.depth, tree_top_k=args.top_k)
    inputs = random_prompt(target, args.context)
    arguments: dict[str, Any] = {"max_new_tokens": args.limit or args.new_tokens, "do_sample": False}
    if args.limit:
        arguments["stopping_criteria"] = [ends_at(args.context + args.new_tokens)]

    def generate(**more: Any) -> Callable[[], torch.Tensor]:
        return lambda: target.generate(**inputs, **arguments, **more)

    for more in ({}, {"assistant_model": draft}):  # warm-up: some memory is allocated once per process
        target.generate(**inputs, max_new_tokens=2, do_sample=False, **more)
    alone, expected = peak_bytes(generate(), device)
    drafted, tokens = peak_bytes(generate(assistant_model=draft), device)

    weights = sum(weight.numel() * weight.element_size() for weight in draft.parameters())
    allowed = {
        "the draft's weights": weights,
        "its keys and values": (args.context + args.new_tokens) * slot_bytes(draft.config, target.dtype),
        f"{TARGET_SLOTS} slots of the target": TARGET_SLOTS * slot_bytes(config.text_config, target.dtype),
    }
    # The draft's weights existed before both calls, so they are added here.
    added, total = weights + drafted - alone, sum(allowed.values())

    console = Console(width=100)
    console.print(
        f"Peak memory: hidden {args.hidden}, {args.layers} layers, vocabulary {args.vocabulary:,}, "
        f"context {args.context:,}, {args.new_tokens} new tokens of at most {arguments['max_new_tokens']}, "
        f"{args.nodes} nodes, depth {args.depth}, top-k {args.top_k}, {args.dtype}, {device.type}"
    )
    table = Table("", "MB", title="the target's weights left out")
    table.columns[1].justify = "right"
    rows = {"`generate` alone": alone, "with the draft and its weights": weights + drafted, "added": added}
    for name, num_bytes in {**rows, **allowed, "allowed": total}.items():
        table.add_row(name, f"{num_bytes / 1e6:.2f}", end_section=name in ("added", list(allowed)[-1]))
    console.print(table)
    console.print(f"added to allowed  {added / total:.3f} (at most {1 + TOLERANCE:.2f})")
    console.print(f"same tokens       {'yes' if torch.equal(tokens, expected) else 'no'}")


if __name__ == "__main__":
    main()
