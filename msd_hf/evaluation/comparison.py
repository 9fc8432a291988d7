"""Runs several methods of decoding on the same prompt, in turns, and compares their outputs and speeds."""

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
    Timed runs of several methods on one prompt. `generate` alone is among the methods.

    Args:
        runs: the runs of each method, by its name. Runs with the same index were made one after another.
    """

    runs: Mapping[str, Sequence[TimedRun]]

    @property
    def vanilla(self) -> Sequence[TimedRun]:
        """The runs of `generate` alone."""
        return self.runs[VANILLA.name]

    def identical(self, method: str = TREE.name) -> bool:
        """Whether every run of a method has the same tokens as `generate` alone."""
        return all(run.tokens == self.vanilla[0].tokens for run in (*self.vanilla, *self.runs[method]))

    def speedup(self, method: str = TREE.name) -> float:
        """Tokens/s of whole calls of a method, divided by that of `generate` alone; the median over pairs of runs."""
        return self._ratio(method, "tokens_per_second")

    def decode_speedup(self, method: str = TREE.name) -> float:
        """Tokens/s of a method after the prefill, divided by that of `generate` alone; the median over pairs of runs.
        `nan` if there was only one token."""
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
    Runs every method `repeats` times, in turns, so that noise of the machine affects all methods alike.

    Args:
        target, draft, inputs, seed, generate_arguments: the arguments of [`timed_generate`].
        repeats: timed runs of each method.
        methods: the methods. `generate` alone must be among them.
    """
    runs: dict[str, list[TimedRun]] = {method.name: [] for method in methods}
    for repeat in range(repeats):
        first = repeat % len(methods)  # the first method of a turn may find cold caches, so the order rotates
        for method in (*methods[first:], *methods[:first]):
            runs[method.name].append(timed_generate(target, inputs, draft, method, seed, **generate_arguments))
    return Comparison(runs)


__all__ = ["Comparison", "compare"]
