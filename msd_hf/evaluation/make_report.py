"""Runs a benchmark and makes its report: of a pair on prompts, or of a shape with random weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..hub.fingerprint import identify_target
from ..hub.names import public_name
from ..processes.group import ALONE, Processes
from ..training.interruption import resumable
from ..tree.settings import TreeSettings
from .bench import BenchResult, run_bench
from .bench_journal import BenchJournal
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
    journal_folder: Path | None = None,
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
        journal_folder (*optional*): where the results are kept prompt by prompt. The same call goes on there if it was
            killed. The caller removes them with [`~msd_hf.evaluation.bench_journal.remove_journal`].

    Raises:
        MSDError: when no answer is long enough, or `journal_folder` holds results of other arguments.
    """
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments |= {"temperature": temperature, "seed": seed}
    if ignore_eos:
        arguments["eos_token_id"] = None
    settings = {
        "max_new_tokens": max_new_tokens,
        "min_answer_tokens": min_answer_tokens,
        "temperature": temperature,
        "repeats": repeats,
        "seed": seed,
        **({"ignore_eos": True} if ignore_eos else {}),
        **_describe_draft(draft),
    }
    environment, pair = describe_environment(target, processes.number), _describe_pair(target, draft)
    described = {**environment, **pair, **settings}
    with ExitStack() as stack:
        journal = None
        if journal_folder is not None:
            terms = _terms(described, prompts, methods)
            journal = stack.enter_context(BenchJournal(journal_folder, terms, processes.index))
            stack.enter_context(resumable(lambda: journal.place))
        result = run_bench(
            target,
            draft,
            prompts,
            methods,
            repeats,
            min_answer_tokens,
            processes=processes,
            journal=journal,
            **arguments,
        )
    report = {
        "kind": "pair",
        "environment": environment,
        "pair": pair,
        "settings": settings,
        **summarize(result, tokenizer),
    }
    if num_recorded and processes.is_first:
        report["recorded"] = [
            _record(target, draft, prompt, tokenizer, arguments) for prompt in _in_turns(result, num_recorded)
        ]
    return report


def _terms(described: Mapping[str, Any], prompts: Sequence[BenchPrompt], methods: Sequence[Method]) -> dict[str, Any]:
    """What the results of a prompt depend on."""
    names = [(prompt.name, prompt.group, prompt.question) for prompt in prompts]
    return {
        **{name: value for name, value in described.items() if name != "command"},
        "methods": [method.name for method in methods],
        "prompts": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
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
