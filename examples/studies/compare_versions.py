"""
Speed of two checkouts of the package on the bundled pair, call by call in turns.

    git worktree add ../before HEAD~1
    python examples/studies/compare_versions.py --before ../before --after .

Each checkout runs in a process of its own, and only one of the two works at a time. So both see the same state of the
machine, which drifts by more than the difference that is looked for. The first row is the target alone: it shows the
noise of the comparison. Nothing else may run on the machine.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser


# Nodes, depth and top-k of the trees; `None`: the target alone.
TREES: dict[str, tuple[Any, int, int] | None] = {
    "target alone": None,
    "auto": ("auto", 40, 4),
    "59 nodes": (59, 5, 10),
    "24 nodes": (24, 6, 5),
    "chain of 6": (7, 5, 1),
}


@dataclass
class Arguments:
    before: str = field(metadata={"help": "Folder of a checkout."})
    after: str = field(metadata={"help": "Folder of another one."})
    prompts_per_kind: int = field(default=5, metadata={"help": "Held-out prompts of each kind."})
    passes: int = field(default=3, metadata={"help": "Timed passes over the prompts, after one that does not count."})
    max_new_tokens: int = field(default=80, metadata={"help": "Length limit of an answer."})
    threads: int = field(default=2, metadata={"help": "Threads."})


def work(arguments: dict[str, Any]) -> None:
    """Answers jobs from standard input, one a line, with seconds and number of tokens."""
    import torch

    # Not by `msd_hf.loading`, which an older checkout lacks.
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import msd_hf
    from msd_hf.prompts import build_inputs
    from msd_hf.toy import DRAFT_DIR, TARGET_DIR
    from msd_hf.toy.accuracy import make_evaluation_prompts

    torch.set_num_threads(arguments["threads"])
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    target = LlavaForConditionalGeneration.from_pretrained(TARGET_DIR)
    draft = msd_hf.MSDDraftModel.from_pretrained(DRAFT_DIR)
    prompts = make_evaluation_prompts(arguments["prompts_per_kind"], 0)
    inputs = [build_inputs(processor, prompt.question, prompt.image) for prompt in prompts]
    print(json.dumps({"file": msd_hf.__file__, "num_prompts": len(inputs)}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        options: dict[str, Any] = {}
        if job["tree"] is not None:
            settings, options = draft.generation_config, {"assistant_model": draft}
            settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = job["tree"]
        started = time.perf_counter()
        tokens = target.generate(**inputs[job["prompt"]], max_new_tokens=arguments["max_new_tokens"], **options)
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens.tolist()}), flush=True)


class Worker:
    """A process that works with one checkout."""

    def __init__(self, checkout: str, args: Arguments):
        folder = Path(checkout).resolve()
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, __file__, "--work", json.dumps(vars(args))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=folder.parent
        )
        started = self._read()
        if not Path(started["file"]).is_relative_to(folder):
            raise SystemExit(f"{started['file']} was imported, not the package in {folder}.")
        self.num_prompts: int = started["num_prompts"]

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A worker ended: {self.process.args}")
        return json.loads(line)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    before, after = Worker(args.before, args), Worker(args.after, args)
    table = Table("trees", "after / before: median (quartiles)", "all calls together", "same tokens", "calls")
    for name, tree in TREES.items():
        ratios, seconds, num_same = [], {before: 0.0, after: 0.0}, 0
        for number in tqdm(range((args.passes + 1) * before.num_prompts), desc=name, leave=False):
            job = {"prompt": number % before.num_prompts, "tree": tree}
            order = (before, after) if number % 2 else (after, before)
            results = {worker: worker.run(job) for worker in order}
            if number < before.num_prompts:  # warms up
                continue
            for worker, result in results.items():
                seconds[worker] += result["seconds"]
            ratios.append(results[after]["seconds"] / results[before]["seconds"])
            num_same += results[after]["tokens"] == results[before]["tokens"]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        together = f"{seconds[after] / seconds[before]:.3f}"
        same = f"{num_same}/{len(ratios)}"
        table.add_row(name, f"{median:.3f} ({lower:.3f}-{upper:.3f})", together, same, str(len(ratios)))
    Console(width=110).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
