"""Measuring a pair of target and draft."""

from .agreement import Disagreement, find_disagreement
from .comparison import Comparison, TimedRun, compare, median_speedup, timed_generate
from .metrics import mean_acceptance_length


__all__ = [
    "Comparison",
    "Disagreement",
    "TimedRun",
    "compare",
    "find_disagreement",
    "mean_acceptance_length",
    "median_speedup",
    "timed_generate",
]
