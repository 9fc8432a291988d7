"""`generate` with and without a draft on the same prompt, interleaved, with the outputs compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling_msd import MSDDraftModel
from .metrics import mean_acceptance_length


@dataclass(frozen=True)
class TimedRun:
    """One call of `generate`.

    Args:
        tokens (`list[int]`): the new tokens.
        seconds (`float`): wall clock of the whole call, vision tower and prefill included.
        acceptance_lengths (`list[int]`): tokens emitted by each verification; empty without a draft.
    """

    tokens: list[int]
    seconds: float
    acceptance_lengths: list[int]

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class Comparison:
    """The same prompt with and without a draft, a few times each."""

    plain: Sequence[TimedRun]
    drafted: Sequence[TimedRun]

    @property
    def identical(self) -> bool:
        """Whether every run gave the same tokens."""
        return all(run.tokens == self.plain[0].tokens for run in (*self.plain, *self.drafted))

    @property
    def speedup(self) -> float:
        """Median over pairs of runs of the ratio of tokens/s."""
        return statistics.median(
            drafted.tokens_per_second / plain.tokens_per_second
            for plain, drafted in zip(self.plain, self.drafted, strict=True)
        )

    @property
    def tau(self) -> float:
        return mean_acceptance_length([self.drafted[0].acceptance_lengths])


def timed_generate(
    target: PreTrainedModel,
    inputs: Mapping[str, Any],
    draft: MSDDraftModel | None = None,
    seed: int | None = None,
    **generate_arguments: Any,
) -> TimedRun:
    """
    Times one call of `target.generate`.

    Args:
        target (`PreTrainedModel`): the target.
        inputs (`Mapping`): what the processor gave for one prompt.
        draft (`MSDDraftModel`, *optional*): is used as `assistant_model`.
        seed (`int`, *optional*): set before the call.
        generate_arguments: further arguments of `generate`.
    """
    if seed is not None:
        torch.manual_seed(seed)
    _synchronize(target)
    started = time.perf_counter()
    output = target.generate(
        **inputs, **generate_arguments, assistant_model=draft, return_dict_in_generate=True, output_scores=False
    )
    _synchronize(target)
    seconds = time.perf_counter() - started
    return TimedRun(
        tokens=output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        seconds=seconds,
        acceptance_lengths=output.acceptance_lengths[0] if draft is not None else [],
    )


def compare(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    repeats: int = 3,
    seed: int | None = None,
    **generate_arguments: Any,
) -> Comparison:
    """
    Runs `generate` `repeats` times without and with the draft, in turns, so that noise of the machine meets both.

    Args: see [`timed_generate`].
    """
    plain, drafted = [], []
    for _ in range(repeats):
        plain.append(timed_generate(target, inputs, None, seed, **generate_arguments))
        drafted.append(timed_generate(target, inputs, draft, seed, **generate_arguments))
    return Comparison(plain, drafted)


def median_speedup(comparisons: Sequence[Comparison]) -> float:
    """Median of the speedups of several prompts."""
    return statistics.median(comparison.speedup for comparison in comparisons)


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


__all__ = ["Comparison", "TimedRun", "compare", "median_speedup", "timed_generate"]
