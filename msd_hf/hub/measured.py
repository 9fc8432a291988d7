"""The measured figures of a card: `EvalResult`s in its metadata, from which the section of its text is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from ..writing.redaction import redact
from .usage import VISION_TASK


BEGIN, END = "<!-- msd_hf: measured -->", "<!-- msd_hf: end of measured -->"
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_ALL = "all"
# Metric of the metadata -> its name on the page.
_METRICS = {"tau": "tau", "speedup": "speedup", "identical": "identical"}


def results_of_bench(report: Mapping[str, Any], data_name: str, task: str = VISION_TASK) -> list[EvalResult]:
    """
    The figures of a report of `msd-hf bench`.

    Args:
        report: a report of kind "pair".
        data_name: name of the data, for example "llava_mix".
        task: the pipeline tag of the card. `msd-hf bench` loads image-text models.

    Returns:
        tau, speedup and the share of identical answers, for each kind of prompt and for all of them. Without secrets
        and paths.
    """
    environment = report["environment"]
    how = {
        "command": environment["command"],
        "hardware": f"{environment['device']}, {environment['threads']} thread{'s' * (environment['threads'] != 1)}",
        "dtype": environment["dtype"],
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
    }
    groups = [(group, figures["num_prompts"], figures["methods"]) for group, figures in report["groups"].items()]
    if len(groups) != 1:
        groups.append((_ALL, report["num_prompts"], report["methods"]))
    results = []
    for group, num_prompts, methods in groups:
        figures = methods["tree"]
        values = {
            "tau": figures["tau"],
            "speedup": figures["speedup"]["median"],
            "identical": figures["identical_share"],
        }
        results += [
            EvalResult(
                task_type=task,
                dataset_type=re.sub(r"[^\w.-]+", "-", data_name) or "data",
                dataset_name=f"{data_name}, {group}",
                dataset_config=group,
                dataset_args=redact({"num_prompts": num_prompts, **how}),
                metric_type=name,
                metric_name=_METRICS[name],
                metric_value=round(float(value), 3),
            )
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]
    return redact_results(results)


def redact_results(results: Sequence[EvalResult]) -> list[EvalResult]:
    """Results without secrets and paths."""
    return [EvalResult(**redact(vars(result))) for result in results]


def measured_section(results: Sequence[EvalResult] | None, from_training: Mapping[str, float]) -> str:
    """
    The section "Measured" of a card, between two comments by which [`with_section`] finds it again.

    Args:
        results: what was measured with `msd-hf bench`; `None` or empty if nothing was.
        from_training: tau by kind of prompt, as the trainer has measured it on held-out data.
    """
    lines = [BEGIN, "## Measured", ""]
    if results:
        lines += _table(results)
    else:
        lines.append(
            "tau and speedup: not measured. `msd-hf bench --update-card FOLDER` measures and writes them here."
        )
    if from_training:
        taus = ", ".join(f"{kind} {tau:.2f}" for kind, tau in from_training.items())
        lines += ["", f"tau on held-out prompts, as measured by the trainer: {taus}."]
    return "\n".join([*lines, END])


def _table(results: Sequence[EvalResult]) -> list[str]:
    groups: dict[str, dict[str, Any]] = {}
    for result in results:
        groups.setdefault(str(result.dataset_name), {})[str(result.metric_type)] = result.metric_value
    how = {str(result.dataset_name): result.dataset_args or {} for result in results}
    lines = ["| prompts | number | tau | speedup | identical |", "|---|---|---|---|---|"]
    for name, values in groups.items():
        shown = [
            "not measured" if (value := values.get(metric)) is None else _shown(metric, value) for metric in _METRICS
        ]
        lines.append(f"| {_cell(name)} | {_cell(how[name].get('num_prompts', 'unknown'))} | {' | '.join(shown)} |")
    first = next(iter(how.values()))
    parts = [str(first[name]) for name in ("hardware", "dtype", "versions") if first.get(name)]
    lines += [
        "",
        "tau is the number of tokens that the target emits in a verification; alone it emits 1. The speedup is the "
        "median over the prompts, of whole calls against the target alone. Identical: the share of answers with the "
        "same tokens.",
    ]
    if parts:
        lines += ["", f"Measured on {'; '.join(parts)}, with"]
    if first.get("command"):
        lines += ["", "```", str(first["command"]).replace("```", ""), "```"]
    return lines


def _shown(metric: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return _cell(value)
    return f"{value:.0%}" if metric == "identical" else f"{value:.2f}"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def with_section(text: str, section: str) -> str:
    """The text of a card with the section in place of an older one, or at its end."""
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n"


__all__ = ["measured_section", "redact_results", "results_of_bench", "with_section"]
