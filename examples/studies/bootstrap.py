"""Confidence intervals of tau, and of differences of tau, by a bootstrap over seeds and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy


NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def tau(tokens: numpy.ndarray, rounds: numpy.ndarray) -> float:
    """Mean acceptance length: all tokens by all rounds, of any shape."""
    return float(tokens.sum() / rounds.sum())


def tau_interval(tokens: numpy.ndarray, rounds: numpy.ndarray) -> Interval:
    """The interval of tau, from the tokens and rounds `[seeds, prompts]` of a kind of draft."""
    return _interval(lambda index: tau(tokens[index], rounds[index]), tokens.shape)


def difference(first: tuple[numpy.ndarray, numpy.ndarray], second: tuple[numpy.ndarray, numpy.ndarray]) -> Interval:
    """The interval of tau of the first kind of draft less that of the second. Both have the same seeds and prompts,
    which are drawn together: a prompt that is hard for one is hard for the other."""
    return _interval(
        lambda index: tau(first[0][index], first[1][index]) - tau(second[0][index], second[1][index]), first[0].shape
    )


def _interval(statistic: Callable[[tuple[numpy.ndarray, ...]], float], shape: tuple[int, ...]) -> Interval:
    generator = numpy.random.default_rng(0)
    num_seeds, num_prompts = shape
    drawn = [
        statistic(
            numpy.ix_(
                generator.integers(num_seeds, size=num_seeds),
                generator.integers(num_prompts, size=num_prompts),
            )
        )
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = numpy.percentile(drawn, [2.5, 97.5])
    whole = numpy.ix_(numpy.arange(num_seeds), numpy.arange(num_prompts))
    return Interval(statistic(whole), float(low), float(high))
