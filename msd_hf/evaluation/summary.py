"""Computes the figures of a benchmark from its runs, for `report.json`, the tables and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..decoding.result import mean_acceptance_length
from .bench import BenchResult
from .methods import VANILLA, Method
from .metrics import acceptance_by_depth, acceptance_histogram, spread
from .prompt_result import PromptResult
from .round_timing import RoundTiming


# Below this tau a draft hardly helps. Even weak drafts are above it if they fit their target.
LOW_TAU = 1.3
# Two logits whose gap is larger than this are not a near-tie that rounding could turn around.
MAX_GAP_IN_ROUNDINGS = 32

_CAUSES = (
    "The usual causes: the draft is hardly trained, or was trained for another target (or other weights of it), the "
    "chat template is not the one that it was trained with"
)


def summarize(result: BenchResult, tokenizer: Any = None) -> dict[str, Any]:
    """
    Computes the figures of a benchmark, ready for JSON except for `nan`.

    Args:
        result: the runs.
        tokenizer (*optional*): the target's. With it the figures of a prompt also hold its question and the answers of
            all methods.

    Returns:
        A dict with `methods` (figures by method), `fastest_other` (the fastest of those without our loop), `groups`
        (speedup and tau of each group of prompts), `prompts` (measurements of each prompt) and `warnings`.
    """
    groups: dict[str, list[PromptResult]] = {}
    for prompt in result.prompts:
        groups.setdefault(prompt.prompt.group, []).append(prompt)
    summary: dict[str, Any] = {
        "num_prompts": len(result.prompts),
        "num_too_short": result.num_short,
        "methods": {method.name: _summarize_method(method, result.prompts) for method in result.methods},
        "groups": {
            group: {
                "num_prompts": len(prompts),
                "methods": {method.name: _main_figures(method, prompts) for method in result.methods},
            }
            for group, prompts in sorted(groups.items())
        },
        "prompts": [_summarize_prompt(prompt, tokenizer) for prompt in result.prompts],
    }
    fastest = _fastest_other(result)
    summary["fastest_other"] = fastest.name
    for method in result.methods:
        if method.has_own_loop:
            summary["methods"][method.name]["over_fastest_other"] = asdict(
                spread(
                    prompt.comparison.speedup(method.name) / prompt.comparison.speedup(fastest.name)
                    for prompt in result.prompts
                )
            )
    return summary | {"warnings": find_warnings(summary)}


def _fastest_other(result: BenchResult) -> Method:
    """The fastest method, in the median, of those that transformers has without this package: what a user would take
    instead."""

    def speedup(method: Method) -> float:
        return spread(prompt.comparison.speedup(method.name) for prompt in result.prompts).median

    return max((method for method in result.methods if not method.has_own_loop), key=speedup)


def find_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Makes warnings about figures of a summary that point to a mistake of the user or to a bug."""
    warnings = []
    tree = summary["methods"].get("tree", {})
    tau = tree.get("tau")
    by_group = {group: figures["methods"]["tree"]["tau"] for group, figures in summary["groups"].items() if tree}
    if tau is not None and tau < LOW_TAU:
        images = ", or images do not reach the draft" if "visual" in by_group else ""
        warnings.append(f"tau is {tau:.2f}: hardly any candidate is accepted. {_CAUSES}{images}.")
    elif by_group.get("visual", LOW_TAU) < LOW_TAU:
        warnings.append(
            f"tau is {by_group['visual']:.2f} on prompts with images but {by_group.get('text', tau):.2f} without: the "
            "images may not reach the draft, or it was trained on text alone."
        )
    for name, figures in summary["methods"].items():
        far = [
            difference
            for difference in figures["agreement"]["differences"]
            if difference["gap_in_roundings"] > MAX_GAP_IN_ROUNDINGS
        ]
        if far:
            warnings.append(
                f"{name}: {len(far)} outputs differ from the target alone at tokens whose two largest logits are "
                f"further apart than rounding explains (at most {max(d['gap'] for d in far):.3g}): this is a bug, "
                "please report it."
            )
    return warnings


def _main_figures(method: Method, prompts: Sequence[PromptResult]) -> dict[str, Any]:
    return {
        "speedup": asdict(spread(prompt.comparison.speedup(method.name) for prompt in prompts)),
        "decode_speedup": asdict(spread(prompt.comparison.decode_speedup(method.name) for prompt in prompts)),
        "tau": mean_acceptance_length(_lengths(method, prompts)),
        "identical_share": _summarize_agreement(method, prompts)["share"],
    }


def _summarize_method(method: Method, prompts: Sequence[PromptResult]) -> dict[str, Any]:
    runs = [run for prompt in prompts for run in prompt.comparison.runs[method.name]]
    lengths = _lengths(method, prompts)
    peaks = [prompt.observations[method.name].peak_memory for prompt in prompts]
    figures = {
        "description": method.description,
        "tokens_per_second": sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs),
        "decode_tokens_per_second": sum(len(run.tokens) - 1 for run in runs) / sum(run.decode_seconds for run in runs),
        **_main_figures(method, prompts),
        "mean_accepted_draft_tokens": mean_acceptance_length(lengths) - 1,
        "acceptance_histogram": acceptance_histogram(lengths),
        "acceptance_by_depth": [asdict(row) for row in acceptance_by_depth(lengths)],
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "agreement": _summarize_agreement(method, prompts),
    }
    timings = [timing for prompt in prompts if (timing := prompt.observations[method.name].round_timing) is not None]
    if timings:
        figures |= summarize_rounds(RoundTiming.total(timings))
    return figures


def summarize_rounds(timing: RoundTiming) -> dict[str, Any]:
    """The figures of a report about the rounds of a decoding loop: their number, efficiency and time."""
    return {
        "num_rounds": timing.num_rounds,
        "round_efficiency": timing.efficiency,
        "round_milliseconds": timing.milliseconds_per_round,
    }


def _summarize_agreement(method: Method, prompts: Sequence[PromptResult]) -> dict[str, Any]:
    differences = [
        {"prompt": prompt.prompt.name, **asdict(prompt.differences[method.name])}
        for prompt in prompts
        if method.name in prompt.differences
    ]
    return {
        "identical": len(prompts) - len(differences),
        "share": 1 - len(differences) / len(prompts),
        "differences": differences,
    }


def _summarize_prompt(result: PromptResult, tokenizer: Any) -> dict[str, Any]:
    figures = {
        "name": result.prompt.name,
        "group": result.prompt.group,
        "prompt_tokens": result.prompt_length,
        "new_tokens": len(result.comparison.vanilla[0].tokens),
        "seconds": {name: [run.seconds for run in runs] for name, runs in result.comparison.runs.items()},
        "prefill_seconds": {name: [run.prefill_seconds for run in runs] for name, runs in _runs(result)},
        "acceptance_lengths": {
            name: observation.acceptance_lengths
            for name, observation in result.observations.items()
            if name != VANILLA.name
        },
    }
    if tokenizer is not None:
        answers = {name: tokenizer.decode(runs[0].tokens, skip_special_tokens=True) for name, runs in _runs(result)}
        figures |= {"question": result.prompt.question, "answers": answers}
    return figures


def _runs(result: PromptResult):
    return result.comparison.runs.items()


def _lengths(method: Method, prompts: Sequence[PromptResult]) -> list[list[int]]:
    return [prompt.observations[method.name].acceptance_lengths for prompt in prompts]


__all__ = ["find_warnings", "summarize", "summarize_rounds"]
