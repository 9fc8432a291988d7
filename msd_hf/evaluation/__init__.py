"""Measuring a pair of target and draft."""

from .comparison import Comparison, TimedRun, compare, median_speedup, timed_generate
from .metrics import mean_acceptance_length


__all__ = ["Comparison", "TimedRun", "compare", "mean_acceptance_length", "median_speedup", "timed_generate"]
