"""Runs a benchmark and makes its report: of a pair on prompts, or of a shape with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..hub.fingerprint import identify_target
from ..hub.names import public_name
from ..processes.group import ALONE, Processes
from ..tree.settings import TreeSettings
from .bench import BenchResult, run_bench
from .bench_prompts import BenchPrompt
from .environment import describe_environment
from .methods import Method
from .recorded_rounds import record_rounds
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
    tokenizer: Any = None,
    num_recorded: int = 0,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """
    Measures a target and its draft on prompts and makes the report. [`run_bench`] measures, [`summarize`] makes the
    figures, [`record_rounds`] records a few answers.

    Args:
        temperature: 0 for greedy decoding, above 0 for sampling. Each run has the same seed.
        ignore_eos: whether answers continue after their end, up to `max_new_tokens`.
        tokenizer (*optional*): the target's. With it the report holds questions and answers.
        num_recorded: prompts, of all groups in turn, whose candidate trees the report holds. Needs `tokenizer`.
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
    report = {
        "kind": "pair",
        "environment": describe_environment(target, processes.number),
        "pair": _describe_pair(target, draft),
        "settings": settings,
        **summarize(result, tokenizer),
    }
    if num_recorded and processes.is_first:
        report["recorded"] = [
            _record(target, draft, prompt, tokenizer, arguments) for prompt in _in_turns(result, num_recorded)
        ]
    return report


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


def _in_turns(result: BenchResult, number: int) -> list[BenchPrompt]:
    """The first prompts of a benchmark, of all groups in turn."""
    prompts = [found.prompt for found in result.prompts]
    groups = [[prompt for prompt in prompts if prompt.group == group] for group in sorted({p.group for p in prompts})]
    return [prompt for turn in zip_longest(*groups) for prompt in turn if prompt is not None][:number]


def _record(
    target: PreTrainedModel, draft: MSDDraftModel, prompt: BenchPrompt, tokenizer: Any, arguments: dict[str, Any]
) -> dict[str, Any]:
    inputs = prompt.make_inputs().to(target.device, dtype=target.dtype)
    first, rounds = record_rounds(target, draft, inputs, tokenizer, **arguments)
    return {"prompt": prompt.name, "first": first, "rounds": [asdict(found) for found in rounds]}


def _describe_pair(target: PreTrainedModel, draft: MSDDraftModel) -> dict[str, Any]:
    """The names of target and draft, without paths, and what tells the target from another one of its name."""
    identity = identify_target(target)
    return {
        "target": identity["target_name_or_path"],
        "target_revision": identity["target_revision"],
        "target_fingerprint": identity["target_fingerprint"],
        "draft": public_name(draft.name_or_path)[0],
    }


def _describe_draft(draft: MSDDraftModel) -> dict[str, Any]:
    settings = asdict(TreeSettings.from_generation_config(draft.generation_config))
    size = draft.config.draft_vocab_size
    return {
        "tree": " ".join(f"{name}={value}" for name, value in settings.items()),
        **({} if size is None else {"draft vocabulary": size}),
    }


__all__ = ["report_pair", "report_shape"]
