"""Runs a benchmark and makes its report: of a pair on prompts, or of a shape with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..processes.group import ALONE, Processes
from ..tree.settings import TreeSettings
from .bench import run_bench
from .bench_prompts import BenchPrompt
from .environment import describe_environment
from .methods import Method
from .shape_bench import bench_shape
from .shapes import random_prompt
from .summary import summarize


def report_pair(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    repeats: int,
    max_new_tokens: int,
    min_answer_tokens: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = False,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """
    Measures a target and its draft on prompts and makes the report. [`run_bench`] measures, [`summarize`] makes the
    figures.

    Args:
        temperature: 0 for greedy decoding, above 0 for sampling. Each run has the same seed.
        ignore_eos: whether answers continue after their end, up to `max_new_tokens`.
        processes: the processes that share the prompts, and all get the report.

    Raises:
        MSDError: when no answer is long enough.
    """
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments |= {"temperature": temperature, "seed": seed}
    if ignore_eos:
        arguments["eos_token_id"] = None
    result = run_bench(target, draft, prompts, methods, repeats, min_answer_tokens, processes=processes, **arguments)
    settings = {
        "max_new_tokens": max_new_tokens,
        "min_answer_tokens": min_answer_tokens,
        "temperature": temperature,
        "repeats": repeats,
        "seed": seed,
        **({"ignore_eos": True} if ignore_eos else {}),
        **_describe_draft(draft),
    }
    return {
        "kind": "pair",
        "environment": describe_environment(target, processes.number),
        "settings": settings,
        **summarize(result),
    }


def report_shape(
    shape: str,
    target: PreTrainedModel,
    draft: MSDDraftModel,
    context: int,
    assumed_taus: Sequence[float],
    nodes: Sequence[int],
    repeats: int,
    compile: bool = False,
) -> dict[str, Any]:
    """
    Measures a pair with random weights in a published shape, with simulated acceptance, and makes the report.
    [`bench_shape`] measures.

    Raises:
        MSDError: when the tree is too small for one of the taus.
    """
    inputs = random_prompt(target, context)
    figures = bench_shape(target, draft, inputs, assumed_taus, nodes, repeats=repeats, compile=compile)
    return {
        "kind": "shape",
        "environment": describe_environment(target),
        "settings": {
            "shape": shape,
            "context": context,
            "assumed tau": ", ".join(f"{tau:g}" for tau in assumed_taus),
            "repeats": repeats,
            **_describe_draft(draft),
        },
        "draft_weight_bytes": sum(weight.numel() * weight.element_size() for weight in draft.parameters()),
        **figures,
    }


def _describe_draft(draft: MSDDraftModel) -> dict[str, Any]:
    settings = asdict(TreeSettings.from_generation_config(draft.generation_config))
    size = draft.config.draft_vocab_size
    return {
        "tree": " ".join(f"{name}={value}" for name, value in settings.items()),
        **({} if size is None else {"draft vocabulary": size}),
    }


__all__ = ["report_pair", "report_shape"]
