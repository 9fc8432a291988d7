"""What a benchmark finds on one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import BatchFeature

from .bench_prompts import BenchPrompt
from .comparison import Comparison
from .differences import Difference
from .observation import Observation


@dataclass(frozen=True)
class PromptResult:
    """
    The results of all methods on one prompt.

    Args:
        prompt: the prompt.
        prompt_length: number of its tokens, expanded images included.
        comparison: the timed runs.
        observations: an extra, observed run of each method.
        differences: the first difference from the target alone, for each method whose output differs.
    """

    prompt: BenchPrompt
    prompt_length: int
    comparison: Comparison
    observations: Mapping[str, Observation]
    differences: Mapping[str, Difference]


# Stands for the prompt of a result that comes from a file or from another process, since its function cannot travel.
NAMELESS = BenchPrompt("", "", BatchFeature)

__all__ = ["NAMELESS", "PromptResult"]
