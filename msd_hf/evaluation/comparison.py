"""Several methods on the same prompt, interleaved, with the outputs compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from .methods import TREE, VANILLA, Method
from .timed_run import TimedRun, timed_generate


@dataclass(frozen=True)
class Comparison:
    """
    One prompt by several methods, `generate` alone among them, a few times each.

    Args:
        runs (`Mapping[str, Sequence[TimedRun]]`): by method; run number i of all methods were neighbours in time.
    """

    runs: Mapping[str, Sequence[TimedRun]]

    @property
    def vanilla(self) -> Sequence[TimedRun]:
        return self.runs[VANILLA.name]

    def identical(self, method: str = TREE.name) -> bool:
        """Whether every run of a method gave the tokens of `generate` alone."""
        return all(run.tokens == self.vanilla[0].tokens for run in (*self.vanilla, *self.runs[method]))

    def speedup(self, method: str = TREE.name) -> float:
        """Median over pairs of runs of the ratio of tokens/s, whole calls."""
        return self._ratio(method, "tokens_per_second")

    def decode_speedup(self, method: str = TREE.name) -> float:
        """The same without the prefill; `nan` if there was only one token."""
        return self._ratio(method, "decode_tokens_per_second")

    def _ratio(self, method: str, rate: str) -> float:
        pairs = zip(self.vanilla, self.runs[method], strict=True)
        if rate == "decode_tokens_per_second" and min(len(run.tokens) for run in self.vanilla) < 2:
            return float("nan")
        return statistics.median(getattr(run, rate) / getattr(vanilla, rate) for vanilla, run in pairs)


def compare(
    target: PreTrainedModel,
    draft: MSDDraftModel | None,
    inputs: Mapping[str, Any],
    repeats: int = 3,
    seed: int | None = None,
    methods: Sequence[Method] = (VANILLA, TREE),
    **generate_arguments: Any,
) -> Comparison:
    """
    Runs every method `repeats` times, in turns, so that noise of the machine meets all of them.

    Args: see [`timed_generate`].
    """
    runs: dict[str, list[TimedRun]] = {method.name: [] for method in methods}
    for repeat in range(repeats):
        first = repeat % len(methods)  # whoever is first may find cold caches
        for method in (*methods[first:], *methods[:first]):
            runs[method.name].append(timed_generate(target, inputs, draft, method, seed, **generate_arguments))
    return Comparison(runs)


__all__ = ["Comparison", "compare"]
