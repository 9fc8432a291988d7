"""Measuring a pair of target and draft."""

from .comparison import Comparison, compare
from .methods import METHODS, Method
from .metrics import mean_acceptance_length
from .timed_run import TimedRun, timed_generate


__all__ = [
    "METHODS",
    "Comparison",
    "Method",
    "TimedRun",
    "compare",
    "mean_acceptance_length",
    "timed_generate",
]
