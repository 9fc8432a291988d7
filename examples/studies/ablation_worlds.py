"""The worlds of `ablation.py`: 36, 576 and 2,304 visual tokens a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msd_hf.evaluation.bench_prompts import BenchPrompt
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts
from msd_hf.toy.dataset import ToySamples
from msd_hf.toy.evaluate import toy_prompts
from msd_hf.toy.hard import TARGET_DIR as HARD_TARGET_DIR
from msd_hf.toy.hard import HardSamples
from msd_hf.toy.hard.bench_prompts import hard_prompts
from msd_hf.toy.hard.dataset import KIND_GROUPS


@dataclass(frozen=True)
class World:
    """
    What drafts are trained with and asked about.

    Args:
        target: folder of the target.
        visual_tokens: visual tokens of a conversation about pictures.
        samples: makes the first training conversations of `"text"` or `"visual"`, `(kind, number) -> data`.
        prompts: makes held-out prompts, `(processor, number of each kind of question) -> prompts`.
        batch_size: conversations of a training step.
        forward_batch_size: conversations of a forward of the target.
        steps: default number of training steps.
    """

    target: Path
    visual_tokens: int
    samples: Callable[[str, int], Sequence[dict[str, Any]]]
    prompts: Callable[[Any, int], list[BenchPrompt]]
    batch_size: int
    forward_batch_size: int
    steps: int


def _toy_samples(kind: Any, number: int) -> Sequence[dict[str, Any]]:
    return ToySamples("train", number, 0, kind)


def _toy_prompts(processor: Any, per_kind: int) -> list[BenchPrompt]:
    return toy_prompts(processor, per_kind * len(make_evaluation_prompts(1, 0)), seed=0)


def _hard(about: Any, kinds: Sequence[str], batch_size: int, visual_tokens: int, steps: int) -> World:
    def samples(kind: str, number: int) -> HardSamples:
        return HardSamples("train", number, 0, "text" if kind == "text" else about)

    def prompts(processor: Any, per_kind: int) -> list[BenchPrompt]:
        asked = [*KIND_GROUPS["text"], *kinds]
        return hard_prompts(processor, per_kind * len(asked), seed=0, kinds=asked, about=about)

    return World(HARD_TARGET_DIR, visual_tokens, samples, prompts, batch_size, 1, steps)


WORLDS = {
    "toy": World(TARGET_DIR, 36, _toy_samples, _toy_prompts, 16, 32, 400),
    "large": _hard("large", KIND_GROUPS["picture"], 8, 576, 400),
    "gallery": _hard("gallery", KIND_GROUPS["album"], 4, 2304, 400),
}
