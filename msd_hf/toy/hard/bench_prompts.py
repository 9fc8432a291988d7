"""Held-out questions of the hard world for a benchmark."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...evaluation.bench_prompts import BenchPrompt
from ...prompts import build_chat_inputs
from .dataset import KINDS, make_evaluation_prompts


def hard_prompts(processor: Any, num_prompts: int, seed: int) -> list[BenchPrompt]:
    """Makes `num_prompts` held-out questions. The kinds of questions take turns."""
    per_kind = -(-num_prompts // len(KINDS))
    by_kind = make_evaluation_prompts(per_kind, seed)
    prompts = [prompt for number in range(per_kind) for prompt in by_kind[number::per_kind]]
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
