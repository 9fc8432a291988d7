"""Held-out questions of the hard world for a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ...evaluation.bench_prompts import BenchPrompt
from ...prompts import build_chat_inputs
from .dataset import KINDS, SampleKind, make_prompts


def hard_prompts(
    processor: Any,
    num_prompts: int,
    seed: int,
    kinds: Sequence[str] = tuple(KINDS),
    about: SampleKind | None = None,
) -> list[BenchPrompt]:
    """Makes `num_prompts` held-out questions. The `kinds` of questions take turns; those about pictures are about
    `about`, if that is given and fits them."""
    per_kind = -(-num_prompts // len(kinds))
    by_kind = [make_prompts("test", per_kind, seed, kind, None if KINDS[kind] == "text" else about) for kind in kinds]
    prompts = [of_kind[number] for number in range(per_kind) for of_kind in by_kind]
    return [
        BenchPrompt(
            f"{prompt.kind} {number}",
            "visual" if prompt.images else "text",
            partial(build_chat_inputs, processor, prompt.messages, prompt.images),
            prompt.question,
            prompt.images,
        )
        for number, prompt in enumerate(prompts[:num_prompts])
    ]
