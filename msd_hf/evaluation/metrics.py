"""Figures of merit of speculative decoding, as papers define them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def acceptance_histogram(acceptance_lengths: Iterable[Sequence[int]]) -> dict[int, int]:
    """The number of verifications that emitted 1, 2, 3, ... tokens, up to the largest number."""
    counts = Counter(length for sequence in acceptance_lengths for length in sequence)
    return {length: counts[length] for length in range(1, max(counts, default=0) + 1)}


@dataclass(frozen=True)
class DepthAcceptance:
    """
    How often a candidate at one depth of the tree was accepted.

    Args:
        depth: levels below the root, from 1.
        share: share of all verifications.
        given_parent: share of the verifications that accepted a node one level above.
    """

    depth: int
    share: float
    given_parent: float


def acceptance_by_depth(acceptance_lengths: Iterable[Sequence[int]]) -> list[DepthAcceptance]:
    """
    Acceptance at depth 1, and at each deeper level where a candidate was accepted. The last verification of an answer
    does not count, because the end of the answer may cut its path.
    """
    accepted = [length - 1 for sequence in acceptance_lengths for length in sequence[:-1]]
    rows: list[DepthAcceptance] = []
    reached = len(accepted)
    depth = 1
    while reached:
        count = sum(number >= depth for number in accepted)
        if not count and depth > 1:
            break  # the tree may never have been this deep
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
    """Median and quartiles of the values that are not `nan`; all `nan` if there are none."""
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
