"""Figures of merit of speculative decoding, as papers define them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def acceptance_histogram(acceptance_lengths: Iterable[Sequence[int]]) -> dict[int, int]:
    """How many verifications emitted 1, 2, 3, ... tokens, up to the longest."""
    counts = Counter(length for sequence in acceptance_lengths for length in sequence)
    return {length: counts[length] for length in range(1, max(counts, default=0) + 1)}


@dataclass(frozen=True)
class DepthAcceptance:
    """
    How often a candidate at one depth of the tree was accepted.

    Args:
        depth (`int`): levels below the root, from 1.
        share (`float`): of all verifications.
        given_parent (`float`): of the verifications that accepted a node at the depth before.
    """

    depth: int
    share: float
    given_parent: float


def acceptance_by_depth(acceptance_lengths: Iterable[Sequence[int]]) -> list[DepthAcceptance]:
    """
    Acceptance at each depth where a candidate was ever accepted (at depth 1 in any case). The last verification of an
    answer does not count, since there the end of the answer cut the path short.
    """
    accepted = [length - 1 for sequence in acceptance_lengths for length in sequence[:-1]]
    rows: list[DepthAcceptance] = []
    reached = len(accepted)
    depth = 1
    while reached:
        count = sum(number >= depth for number in accepted)
        if not count and depth > 1:
            break  # perhaps the tree never was that deep
        rows.append(DepthAcceptance(depth, count / len(accepted), count / reached))
        reached, depth = count, depth + 1
    return rows


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles of values, `nan`s left out; all `nan` if nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        value = known[0] if known else float("nan")
        return Spread(value, value, value)
    lower, median, upper = statistics.quantiles(known, n=4, method="inclusive")
    return Spread(median, lower, upper)


__all__ = [
    "DepthAcceptance",
    "Spread",
    "acceptance_by_depth",
    "acceptance_histogram",
    "spread",
]
