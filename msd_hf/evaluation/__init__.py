"""Measurements of a target and its draft: speed, acceptance and agreement."""

from ..decoding.result import mean_acceptance_length
from .agreement import Disagreement, find_disagreement
from .comparison import Comparison, compare
from .methods import METHODS, Method
from .timed_run import TimedRun, timed_generate
from .tuning import TuneResult, tune_draft


__all__ = [
    "METHODS",
    "Comparison",
    "Disagreement",
    "Method",
    "TimedRun",
    "TuneResult",
    "compare",
    "find_disagreement",
    "mean_acceptance_length",
    "timed_generate",
    "tune_draft",
]
