"""
Cache upkeep of a round by the length of the context: append the nodes of a tree, keep the accepted slots, drop the
others. Our in-place cache is compared with the concatenation of a `DynamicCache`.

    python examples/studies/bench_cache.py --contexts 500 1000 2000 4000 8000
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, HfArgumentParser

from msd_hf.evaluation.clock import synchronize
from msd_hf.kv.in_place import truncate
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, make_in_place
from msd_hf.loading import parse_device, parse_dtype


@dataclass
class BenchArguments:
    contexts: list[int] = field(default_factory=lambda: [500, 1000, 2000, 4000, 8000], metadata={"help": "Lengths."})
    layers: int = field(default=16, metadata={"help": "Decoder layers."})
    heads: int = field(default=16, metadata={"help": "Key-value heads."})
    head_dim: int = field(default=64, metadata={"help": "Size of a head."})
    nodes: int = field(default=59, metadata={"help": "Nodes of the tree."})
    accepted: int = field(default=4, metadata={"help": "Slots of the tree that are kept."})
    repeats: int = field(default=20, metadata={"help": "Timed rounds; the median is reported."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "Device; auto: the GPU if there is one."})


def round_milliseconds(args: BenchArguments, context: int, in_place: bool) -> float:
    dtype, device = parse_dtype(args.dtype), parse_device(args.device)

    def states(slots: int) -> torch.Tensor:
        return torch.zeros(1, args.heads, slots, args.head_dim, dtype=dtype, device=device)

    cache = DynamicCache()
    if in_place:
        make_in_place(cache, context + args.nodes)
    prompt, nodes = states(context), states(args.nodes)
    for layer in range(args.layers):
        cache.update(prompt, prompt, layer)
    path = torch.linspace(0, args.nodes - 1, args.accepted, device=device).long().unsqueeze(0)
    seconds = []
    for _ in range(args.repeats + 2):
        slots = ContextSlots([context])
        synchronize(device)
        started = time.perf_counter()
        for layer in range(args.layers):
            cache.update(nodes, nodes, layer)
        if in_place:
            CacheTransaction(cache, slots).commit([args.accepted], path)
        else:
            cache.crop(args.accepted - args.nodes)  # only the first slots can be kept, as for a chain
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        if in_place:
            truncate(cache, context)
        else:
            cache.crop(-args.accepted)
    return 1e3 * statistics.median(seconds[2:])


@torch.no_grad()
def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    console = Console(width=100)
    console.print(
        f"Cache upkeep of a round in ms: {args.layers} layers, {args.heads} heads of {args.head_dim}, "
        f"{args.nodes} nodes, {args.accepted} kept, {args.dtype}, {args.threads} threads"
    )
    table = Table()
    for name in ("context", "in place", "concatenating"):
        table.add_column(name, justify="right")
    for context in args.contexts:
        figures = (round_milliseconds(args, context, in_place) for in_place in (True, False))
        table.add_row(f"{context:,}", *(f"{value:.2f}" for value in figures))
    console.print(table)


if __name__ == "__main__":
    main()
