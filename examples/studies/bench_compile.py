"""
The toy pair's draft with `compile=True` against the same draft without it, and against the target alone: in turns on
the same held-out prompts, after a first call that compiles.

    python examples/studies/bench_compile.py --prompts 8
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from msd_hf import MSDDraftModel
from msd_hf.evaluation.phase_timer import PhaseTimer
from msd_hf.loading import load_target_and_processor
from msd_hf.prompts import build_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts


PHASES = ("target forward", "draft forward", "draft head", "tree")


@dataclass
class BenchArguments:
    prompts: int = field(default=8, metadata={"help": "Held-out prompts."})
    repeats: int = field(default=3, metadata={"help": "Runs of each, in turns."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length limit of an answer."})
    nodes: int = field(default=16, metadata={"help": "Nodes of the tree."})
    depth: int = field(default=5, metadata={"help": "Expansions after the first."})
    top_k: int = field(default=4, metadata={"help": "Candidates of each node, and nodes expanded at each level."})
    threads: int = field(default=1, metadata={"help": "Threads."})
    device: str = field(default="auto", metadata={"help": "Device; auto: the GPU if there is one."})


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    target, processor = load_target_and_processor(TARGET_DIR, device=args.device)
    device = target.device
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR).to(device)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = args.nodes, args.depth, args.top_k
    methods = {"alone": {}, "eager": {"assistant_model": draft}, "compiled": {"assistant_model": draft}}

    def run(method: str, inputs: dict) -> tuple[torch.Tensor, float, PhaseTimer]:
        settings.compile = method == "compiled"
        started = time.perf_counter()
        with PhaseTimer(device) as timer:
            tokens = target.generate(
                **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, **methods[method]
            ).cpu()
        return tokens, time.perf_counter() - started, timer

    console = Console(width=100)
    prompts = make_evaluation_prompts(args.prompts, 0)
    prompts = prompts[:: max(len(prompts) // args.prompts, 1)][: args.prompts]
    examples = [build_inputs(processor, prompt.question, prompt.image).to(device) for prompt in prompts]
    for method in methods:
        seconds = sum(run(method, inputs)[1] for inputs in examples)
        console.print(f"first pass, {method}: {seconds:.1f} s")
    rates: dict[str, list[float]] = {method: [] for method in methods}
    phases: dict[str, dict[str, float]] = {method: {} for method in methods}
    num_same = 0
    for inputs in examples:
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        outputs = {}
        for _ in range(args.repeats):
            for method in methods:
                outputs[method], spent, timer = run(method, inputs)
                seconds[method].append(spent)
                for name, share in timer.inside("decode").items():
                    phases[method][name] = phases[method].get(name, 0.0) + share
        num_same += all(torch.equal(outputs["alone"], tokens) for tokens in outputs.values())
        count = outputs["alone"].shape[1] - inputs["input_ids"].shape[1]
        for method, spent in seconds.items():
            rates[method].append(count / statistics.median(spent))

    table = Table("method", "tokens/s", "against eager", *PHASES, title="medians; phases in seconds over all runs")
    for method in methods:
        ratios = [rate / eager for rate, eager in zip(rates[method], rates["eager"], strict=True)]
        table.add_row(
            method,
            f"{statistics.median(rates[method]):.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            *(f"{phases[method].get(name, 0.0):.2f}" for name in PHASES),
        )
    console.print(f"{num_same} of {len(examples)} prompts with the same tokens in all three; {args}")
    console.print(table)


if __name__ == "__main__":
    main()
