"""Figures of one prompt, or of some prompts, from the measurements that a report holds of each prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ..decoding.result import mean_acceptance_length
from .methods import TREE, VANILLA


def speedup_of(prompt: Mapping[str, Any], method: str = TREE.name) -> float:
    """The speedup of a method on one prompt: the time of the target alone over its own, the median over pairs of
    runs."""
    pairs = zip(prompt["seconds"][VANILLA.name], prompt["seconds"][method], strict=True)
    return statistics.median(alone / drafted for alone, drafted in pairs)


def median_speedup(prompts: Iterable[Mapping[str, Any]], method: str = TREE.name) -> float:
    """The median speedup of a method over prompts."""
    return statistics.median(speedup_of(prompt, method) for prompt in prompts)


def tau_of(prompts: Iterable[Mapping[str, Any]], method: str = TREE.name) -> float:
    """Mean number of tokens that a verification emits; 1 for the target alone, `nan` if there was none."""
    if method == VANILLA.name:
        return 1.0
    return mean_acceptance_length(prompt["acceptance_lengths"][method] for prompt in prompts)


def rate_of(prompts: Iterable[Mapping[str, Any]], method: str = TREE.name) -> float:
    """Tokens of all answers over the time of all calls, in tokens/s."""
    runs = [(prompt["new_tokens"], prompt["seconds"][method]) for prompt in prompts]
    return sum(number * len(seconds) for number, seconds in runs) / sum(sum(seconds) for _, seconds in runs)


__all__ = ["median_speedup", "rate_of", "speedup_of", "tau_of"]
