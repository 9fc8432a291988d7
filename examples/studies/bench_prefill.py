"""
The draft's pass over prompts with many visual tokens: seconds, cache, and the time to the first token.

    python examples/studies/bench_prefill.py

One picture of the hard world, larger and larger, and the draft with all visual rows, with budgets of them
(`max_visual_rows`), and the target alone, in turns. Needs an otherwise idle machine.
"""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.generation.streamers import BaseStreamer

from msd_hf import MSDDraftModel
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.evaluation.phase_timer import PhaseTimer
from msd_hf.loading import load_target_and_processor
from msd_hf.prompts import build_inputs
from msd_hf.toy.hard import DRAFT_DIR, TARGET_DIR, make_picture, render


ALONE, ALL = "target alone", "all"
THINGS_A_CELL = 0.4


@dataclass
class PrefillArguments:
    target: str = field(default=str(TARGET_DIR), metadata={"help": "Folder of the target."})
    draft: str = field(default=str(DRAFT_DIR), metadata={"help": "Folder of the draft."})
    grids: str = field(default="6,12,24", metadata={"help": "Cells a side of the picture; a cell has 16 tokens."})
    budgets: str = field(default="36,144,576", metadata={"help": "Values of max_visual_rows."})
    repeats: int = field(default=5, metadata={"help": "Timed runs of each setting, in turns."})


class FirstTokenClock(BaseStreamer):
    """Notes when the first token of the answer arrives."""

    def __init__(self) -> None:
        self.puts = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the prompt comes first
            self.seconds = time.perf_counter() - self.started

    def end(self) -> None:
        pass


@contextmanager
def seen_caches(sizes: list[int]) -> Iterator[None]:
    """Inside the block, the bytes of each draft's cache after its prompt are appended to `sizes`."""
    own = GrowingDrafter.prefill

    def prefill(self: GrowingDrafter, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        layers: Any = self.cache.layers
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    GrowingDrafter.prefill = prefill  # type: ignore[method-assign]
    try:
        yield
    finally:
        GrowingDrafter.prefill = own  # type: ignore[method-assign]


def main() -> None:
    (args,) = HfArgumentParser(PrefillArguments, description=__doc__).parse_args_into_dataclasses()
    target, processor = load_target_and_processor(args.target)
    draft = MSDDraftModel.from_pretrained(args.draft)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = 16, 5, 4
    ways: list[Any] = [ALONE, ALL, *(int(budget) for budget in args.budgets.split(","))]
    first: dict[Any, list[float]] = defaultdict(list)
    passes: dict[Any, list[float]] = defaultdict(list)
    caches: dict[Any, int] = {}
    grids = [int(grid) for grid in args.grids.split(",")]
    for grid in grids:
        picture = make_picture(random.Random(grid), "test", grid, int(THINGS_A_CELL * grid * grid))
        inputs = build_inputs(processor, "What do the signs say?", render(picture))
        for repeat in tqdm(range(args.repeats + 1), desc=f"{16 * grid * grid} visual tokens"):
            for way in ways:
                settings.max_visual_rows = None if way in (ALONE, ALL) else way
                options = {} if way == ALONE else {"assistant_model": draft}
                clock, sizes = FirstTokenClock(), []
                with PhaseTimer() as timer, seen_caches(sizes):
                    target.generate(**inputs, **options, streamer=clock, max_new_tokens=8, do_sample=False)
                if repeat == 0:  # warm-up
                    continue
                first[grid, way].append(clock.seconds)
                passes[grid, way].append(timer.inside("prefill").get("draft forward", 0.0))
                if sizes:
                    caches[grid, way] = sizes[0]
    table = Table(title="The draft's pass over the prompt (medians)")
    for name in ("visual tokens", "visual rows of the draft", "draft's pass (ms)", "of all rows", "of the target's"):
        table.add_column(name, justify="right")
    table.add_column("draft's cache (KiB)", justify="right")
    table.add_column("first token (ms)", justify="right")
    for grid in grids:
        alone = statistics.median(first[grid, ALONE])
        for way in ways:
            seconds = statistics.median(passes[grid, way])
            row = [str(16 * grid * grid), str(way)]
            if way == ALONE:
                row += ["", "", "", ""]
            else:
                share = seconds / statistics.median(passes[grid, ALL])
                row += [f"{1e3 * seconds:.2f}", f"{share:.1%}", f"{seconds / alone:.1%}"]
                row.append(f"{caches[grid, way] / 1024:.0f}")
            table.add_row(*row, f"{1e3 * statistics.median(first[grid, way]):.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
