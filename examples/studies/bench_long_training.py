"""
Peak memory and tokens/s of a training step, by tokens a sample and by unrolled passes.

    python examples/studies/bench_long_training.py
    python examples/studies/bench_long_training.py --max_visual_rows 576 --passes 3

A step is the forward and backward of a draft and its loss over one sample of random features, as they come from a
feature cache, in a process of its own. Its first four fifths are visual positions, its last tenth is trained. Memory
is the peak of what tensors hold above the start of a step, which has weights, gradients and features already. Times
are taken from steps of their own, because recording memory slows a step down; with `--repeats 0` there are none.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_memory import peak_bytes
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from msd_hf.evaluation.clock import synchronize
from msd_hf.evaluation.shapes import build_pair, small_config
from msd_hf.loading import parse_device, parse_dtype
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.objective import DraftObjective


WARM_UP = 64  # tokens of a first step, which loads libraries and makes the gradients


@dataclass
class BenchArguments:
    lengths: list[int] = field(
        default_factory=lambda: [512, 2048, 4000, 16000], metadata={"help": "Tokens of a sample."}
    )
    passes: list[int] = field(default_factory=lambda: [1, 3], metadata={"help": "Unrolled passes."})
    max_visual_rows: int | None = field(default=None, metadata={"help": "Most visual rows that the draft reads."})
    checkpointing: bool = field(default=False, metadata={"help": "With gradient checkpointing."})
    hidden: int = field(default=1024, metadata={"help": "Hidden size."})
    heads: int = field(default=16, metadata={"help": "Attention heads."})
    intermediate: int = field(default=2816, metadata={"help": "Width of the MLP."})
    vocabulary: int = field(default=32000, metadata={"help": "Vocabulary."})
    repeats: int = field(default=1, metadata={"help": "Timed steps, whose median is reported; 0: memory alone."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "Device; auto: the GPU if there is one."})
    measured: bool = field(default=False, metadata={"help": "Set by the script: measure the only setting here."})


def random_batch(length: int, args: BenchArguments, device: torch.device) -> dict[str, Any]:
    """A sample as `MixtureCollator` returns it."""
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(100, args.vocabulary - 1, (1, length), generator=generator)
    num_visual = length * 4 // 5
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "visual_mask": (torch.arange(length) < num_visual).unsqueeze(0),
        "visual_embeds": torch.randn(num_visual, args.hidden, generator=generator),
        "hidden_states": torch.randn(1, length, args.hidden, generator=generator),
        "labels": input_ids.masked_fill(torch.arange(length) < length * 9 // 10, -100),
        "numbers": torch.tensor([0]),
    }
    return {name: value.to(device) for name, value in batch.items()}


def measure(args: BenchArguments) -> None:
    """Prints the figures of one setting as JSON."""
    torch.set_num_threads(args.threads)
    device = parse_device(args.device)
    config = small_config(args.hidden, args.intermediate, args.heads, args.vocabulary, num_layers=1)
    target, draft = build_pair(config, parse_dtype(args.dtype), device)
    target.requires_grad_(False)
    draft.train()
    if args.checkpointing:
        draft.gradient_checkpointing_enable()
    (length,), (num_passes,) = args.lengths, args.passes
    training = MSDTrainingArguments(
        unroll_passes=num_passes,
        max_visual_rows=args.max_visual_rows,
        noise=0.0,
        report_to="none",
        use_cpu=device.type == "cpu",
    )
    objective = DraftObjective(TargetAdapter(target), training)

    def step(batch: dict[str, Any]) -> None:
        loss, _ = objective(draft, batch, draft.dtype)
        loss.backward()

    step(random_batch(WARM_UP, args, device))
    batch = random_batch(length, args, device)
    num_bytes, _ = peak_bytes(lambda: step(batch), device)
    seconds = []
    for _ in range(args.repeats):
        synchronize(device)
        started = time.perf_counter()
        step(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"bytes": num_bytes, "seconds": statistics.median(seconds) if seconds else None}))


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    if args.measured:
        measure(args)
        return
    budget = "all visual rows" if args.max_visual_rows is None else f"at most {args.max_visual_rows} visual rows"
    shape = f"hidden {args.hidden}, vocabulary {args.vocabulary:,}, {args.dtype}, {args.threads} threads"
    table = Table(title=f"{budget}{', checkpointing' if args.checkpointing else ''}, {shape}")
    for name in ("tokens a sample", "passes", "peak memory", "bytes a token", "tokens/s"):
        table.add_column(name, justify="right")
    for num_passes in args.passes:
        for length in args.lengths:
            setting = ["--lengths", str(length), "--passes", str(num_passes), "--measured", "True"]
            # Of an argument that is given twice, the last one counts.
            run = subprocess.run([sys.executable, *sys.argv, *setting], capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            figures = json.loads(run.stdout)
            table.add_row(
                f"{length:,}",
                str(num_passes),
                f"{figures['bytes'] / 1e6:,.0f} MB",
                f"{figures['bytes'] / length:,.0f}",
                f"{length / figures['seconds']:,.0f}" if figures["seconds"] else "-",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
