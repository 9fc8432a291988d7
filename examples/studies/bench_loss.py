"""
Peak memory and tokens/s of the loss: chunks over the trained positions against the plain form over all positions.

    python examples/studies/bench_loss.py --batch 2 --length 1024 --hidden 1024 --vocabulary 32000

Each form runs forward and backward of the loss alone, in its own process. Memory is the growth of the peak of the
process, or on a GPU of the allocator. A third of the positions are trained, as in a usual conversation.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from msd_hf.loading import parse_device
from msd_hf.training import RECIPES
from msd_hf.training.losses import loss_sums, weighted_loss


@dataclass
class BenchArguments:
    batch: int = field(default=2, metadata={"help": "Samples."})
    length: int = field(default=1024, metadata={"help": "Tokens of each."})
    hidden: int = field(default=1024, metadata={"help": "Hidden size."})
    vocabulary: int = field(default=32000, metadata={"help": "Vocabulary."})
    chunk_size: int = field(default=1024, metadata={"help": "Rows of logits at a time."})
    repeats: int = field(default=3, metadata={"help": "Timed steps; the median is reported."})
    device: str = field(default="auto", metadata={"help": "Device; auto: the GPU if there is one."})
    form: str | None = field(default=None, metadata={"help": "Set by the script: plain or chunked."})


def plain_loss(states, goals, trained, head):
    """The form of the original code: logits of all positions, masked afterwards."""
    log_probs = head(states).log_softmax(-1)
    with torch.no_grad():
        goal_probs = head(goals).softmax(-1)
    token_loss = -(goal_probs * log_probs).sum(-1)[trained].sum()
    feature_loss = torch.nn.functional.smooth_l1_loss(states, goals, reduction="none").mean(-1)[trained].sum()
    return (feature_loss + 0.1 * token_loss) / trained.sum()


def chunked_loss(states, goals, trained, head, chunk_size):
    sums = loss_sums(states[trained], goals[trained], head, chunk_size)
    return weighted_loss(sums.terms, RECIPES["paper"]) / sums.num_rows


def run(args: BenchArguments) -> None:
    device = parse_device(args.device)
    torch.manual_seed(0)  # both forms get the same inputs and the same head
    shape = (args.batch, args.length, args.hidden)
    states = torch.randn(shape).to(device).requires_grad_()
    goals = torch.randn(shape).to(device)
    trained = torch.arange(args.length, device=device).expand(args.batch, -1) >= args.length * 2 // 3
    head = torch.nn.Linear(args.hidden, args.vocabulary, bias=False, device=device).requires_grad_(False)
    before = peak_bytes(device)
    seconds = []
    for _ in range(args.repeats):
        states.grad = None
        started = time.perf_counter()
        if args.form == "plain":
            loss = plain_loss(states, goals, trained, head)
        else:
            loss = chunked_loss(states, goals, trained, head, args.chunk_size)
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - started)
    figures = {"bytes": peak_bytes(device) - before, "seconds": statistics.median(seconds), "loss": loss.item()}
    print(json.dumps(figures))


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    if args.form is not None:
        run(args)
        return
    table = Table(title=f"{args.batch} x {args.length} tokens, hidden {args.hidden}, vocabulary {args.vocabulary:,}")
    for name in ("form", "peak memory", "tokens/s", "loss"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for form in ("plain", "chunked"):
        command = [sys.executable, *sys.argv, "--form", form]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        tokens_per_second = args.batch * args.length / figures["seconds"]
        table.add_row(form, f"{figures['bytes'] / 1e6:,.0f} MB", f"{tokens_per_second:,.0f}", f"{figures['loss']:.5f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
