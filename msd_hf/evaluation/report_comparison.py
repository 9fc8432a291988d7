"""Compares saved reports on the prompts that all of them hold: speed, tau, equal texts, and what else differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MSDError
from ..hub.fingerprint import is_other_head
from .methods import VANILLA
from .prompt_figures import median_speedup, rate_of, tau_of
from .report_tables import ReportTable
from .saved_report import SavedReport


_HARDWARE = ("device", "system", "cpu_cores", "threads")
_SETUP = ("dtype", "attention")
_WEIGHTS = "target's weights"


@dataclass(frozen=True)
class ReportComparison:
    """
    Several reports side by side.

    Args:
        num_prompts: prompts that all reports hold.
        tables: the tables.
        notes: what a reader of the tables must know.
    """

    num_prompts: int
    tables: list[ReportTable]
    notes: list[str]


def compare_reports(reports: Sequence[SavedReport]) -> ReportComparison:
    """
    Compares reports on the prompts that all of them hold.

    Args:
        reports: two or more reports. Texts are compared with those of the first.

    Raises:
        MSDError: when there are fewer than two, or they have no prompt in common.
    """
    if len(reports) < 2:
        raise MSDError("A comparison needs two reports or more: give their files behind --compare.")
    names = _common(reports)
    if not names:
        raise MSDError("The reports have no prompt in common: measure both with the same --data.")
    prompts = [[report.prompts[name] for name in names] for report in reports]
    methods = list(dict.fromkeys(name for report in reports for name in report.content["methods"]))
    labels = [report.label for report in reports]
    differences = _differences(reports)
    tables = [
        ReportTable(f"Speed and tau on {len(names)} prompts", ("", *labels), _figures(methods, reports, prompts)),
        ReportTable(f"Texts equal to those of {labels[0]}", ("method", *labels), _equal_texts(methods, prompts)),
    ]
    if differences:
        tables.append(ReportTable("What else differs", ("", *labels), differences))
    return ReportComparison(len(names), tables, _notes(reports, names, prompts, {row[0] for row in differences}))


def _common(reports: Sequence[SavedReport]) -> list[str]:
    """Names of the prompts of the first report that all reports hold, with the same question where it is known."""
    first, *others = [report.prompts for report in reports]
    return [name for name in first if all(name in held and _is_same(first[name], held[name]) for held in others)]


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    questions = (one.get("question"), other.get("question"))
    return None in questions or questions[0] == questions[1]


def _figures(
    methods: Sequence[str], reports: Sequence[SavedReport], prompts: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[str]]:
    """Rows of figures, of every method in turn. A method that a report lacks has none."""
    rows = []
    for name, figure, form in (
        ("tokens/s", rate_of, "{:.1f}"),
        ("speedup", median_speedup, "{:.2f}"),
        ("tau", tau_of, "{:.2f}"),
    ):
        for method in methods:
            if method == VANILLA.name and name != "tokens/s":
                continue
            cells = [
                _cell(form, figure(own, method)) if method in report.content["methods"] else "-"
                for report, own in zip(reports, prompts, strict=True)
            ]
            rows.append([f"{name}, {method}", *cells])
    return rows


def _cell(form: str, value: float) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _equal_texts(methods: Sequence[str], prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    return [[method, *(_equal_share(prompts[0], own, method) for own in prompts)] for method in methods]


def _equal_share(first: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], method: str) -> str:
    pairs = [
        tuple((prompt.get("answers") or {}).get(method) for prompt in pair) for pair in zip(first, own, strict=True)
    ]
    if any(None in pair for pair in pairs):
        return "-"
    equal = sum(one == other for one, other in pairs)
    return f"{equal}/{len(pairs)} ({equal / len(pairs):.1%})"


def _differences(reports: Sequence[SavedReport]) -> list[list[str]]:
    """Rows for all facts that are not the same in all reports."""
    facts = [_facts(report.content) for report in reports]
    heads = [report.content.get("pair", {}).get("target_fingerprint") for report in reports]
    if any(is_other_head(heads[0], head) for head in heads):
        others = ("other" if is_other_head(heads[0], head) else "the same" for head in heads[1:])
        for known, weights in zip(facts, ("those compared with", *others), strict=True):
            known[_WEIGHTS] = weights
    names = dict.fromkeys(name for known in facts for name in known)
    rows = [[name, *(str(known.get(name, "-")) for known in facts)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _facts(content: Mapping[str, Any]) -> dict[str, Any]:
    environment, pair = content["environment"], content.get("pair", {})
    return {
        "target": pair.get("target", "-"),
        "draft": pair.get("draft", "-"),
        **{name.replace("_", " "): environment.get(name) for name in (*_HARDWARE, *_SETUP)},
        **environment["versions"],
        **{name.replace("_", " "): value for name, value in content["settings"].items()},
    }


def _notes(
    reports: Sequence[SavedReport],
    names: Sequence[str],
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    different: set[str],
) -> list[str]:
    notes = []
    most = max(len(report.content["prompts"]) for report in reports)
    if len(names) < most:
        notes.append(f"{len(names)} prompts are in all reports; up to {most - len(names)} others are left out.")
    hardware = different & {name.replace("_", " ") for name in _HARDWARE}
    versions = different & {name for report in reports for name in report.content["environment"]["versions"]}
    if hardware:
        notes.append(
            f"The hardware differs ({', '.join(sorted(hardware))}): tokens/s say little, speedup and tau more."
        )
    if versions:
        notes.append(f"Versions differ: {', '.join(sorted(versions))}.")
    if different & {"target", _WEIGHTS}:
        notes.append("The targets differ: their texts need not be equal, and tau depends on the target.")
    if not any([hardware, versions, different & {"target", _WEIGHTS}]):
        notes.append("Hardware, versions and target are the same.")
    silent = [
        report.label
        for report, own in zip(reports, prompts, strict=True)
        if any(prompt.get("answers") is None for prompt in own)
    ]
    if silent:
        notes.append(
            f"No texts are in {', '.join(silent)}: they were left out, or an earlier version wrote the report."
        )
    return notes


__all__ = ["ReportComparison", "compare_reports"]
