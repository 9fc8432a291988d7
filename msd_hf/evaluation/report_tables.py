"""The tables of a report, for the terminal and for `report.md`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import VANILLA
from .round_timing import PARTS
from .simulation import FIRST_ROUNDS


@dataclass(frozen=True)
class ReportTable:
    """
    One table of a report. All of its cells are texts.

    Args:
        title: title of the table.
        header: names of the columns. The first column is aligned to the left, the others to the right.
        rows: one text for each column.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def report_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """Makes the tables of a report, of a pair or of a shape."""
    return _shape_tables(report) if report["kind"] == "shape" else _pair_tables(report)


def agreement_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """How many answers of a pair are those of the target alone, and where others differ from them."""
    methods = {name: figures for name, figures in report["methods"].items() if name != VANILLA.name}
    number = report["num_prompts"]
    rows = []
    for name, figures in methods.items():
        identical, share = figures["agreement"]["identical"], figures["agreement"]["share"]
        rows.append([name, f"{identical} of {number}", f"{share:.1%}", str(number - identical)])
    header = ("method", "identical answers", "share", "others")
    return [ReportTable("Answers with the tokens of the target alone", header, rows), *_difference_tables(methods)]


def _pair_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    methods = report["methods"]
    others = {name: figures for name, figures in methods.items() if name != VANILLA.name}
    timed = {
        name: figures["round_milliseconds"] for name, figures in methods.items() if figures.get("round_milliseconds")
    }
    return [
        _speed_table(methods, report["num_prompts"]),
        *_fastest_tables(report),
        _summary_table(methods, report["num_prompts"]),
        _group_table(others, report["groups"]),
        *([_round_table(timed)] if timed else []),
        _depth_table(others),
        _histogram_table(others),
        *_difference_tables(methods),
    ]


def _speed_table(methods: Mapping[str, Any], num_prompts: int) -> ReportTable:
    return ReportTable(
        f"Speed on {num_prompts} prompts (speedup: median of paired ratios, quartiles)",
        ("method", "tokens/s", "decode only", "speedup", "decode only"),
        [
            [
                name,
                f"{figures['tokens_per_second']:.1f}",
                f"{figures['decode_tokens_per_second']:.1f}",
                "1" if name == VANILLA.name else _spread(figures["speedup"]),
                "1" if name == VANILLA.name else _spread(figures["decode_speedup"]),
            ]
            for name, figures in methods.items()
        ],
    )


def _fastest_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    """The speed over the fastest method that needs no draft of this package, if that is not `generate` alone."""
    fastest = report.get("fastest_other", VANILLA.name)
    if fastest == VANILLA.name:
        return []
    rows = [
        [name, _spread(figures["over_fastest_other"])]
        for name, figures in report["methods"].items()
        if "over_fastest_other" in figures
    ]
    return [ReportTable(f"Speed over {fastest}, the fastest other method", ("method", "speedup"), rows)]


def _summary_table(methods: Mapping[str, Any], num_prompts: int) -> ReportTable:
    return ReportTable(
        "Acceptance, round efficiency, memory and agreement",
        ("method", "tau", "accepted", "efficiency", "peak MB", "identical"),
        [
            [
                name,
                _number(figures["tau"]),
                _number(figures["mean_accepted_draft_tokens"]),
                _share(figures.get("round_efficiency")),
                _megabytes(figures["peak_memory_bytes"]),
                f"{figures['agreement']['identical']}/{num_prompts} ({figures['agreement']['share']:.1%})",
            ]
            for name, figures in methods.items()
        ],
    )


def _group_table(methods: Mapping[str, Any], groups: Mapping[str, Any]) -> ReportTable:
    return ReportTable(
        "By kind of prompt",
        ("method", "prompts", "speedup", "decode only", "tau"),
        [
            [
                f"{name}, {group}",
                str(figures["num_prompts"]),
                _spread(figures["methods"][name]["speedup"]),
                _spread(figures["methods"][name]["decode_speedup"]),
                _number(figures["methods"][name]["tau"]),
            ]
            for name in methods
            for group, figures in groups.items()
        ],
    )


def _depth_table(methods: Mapping[str, Any]) -> ReportTable:
    num_levels = max(len(figures["acceptance_by_depth"]) for figures in methods.values())
    return ReportTable(
        "Acceptance by depth: share of rounds (given that the node above was accepted)",
        ("depth", *methods),
        [
            [str(level + 1), *(_depth(figures["acceptance_by_depth"], level) for figures in methods.values())]
            for level in range(num_levels)
        ],
    )


def _histogram_table(methods: Mapping[str, Any]) -> ReportTable:
    longest = max(len(figures["acceptance_histogram"]) for figures in methods.values())
    return ReportTable(
        "Rounds by tokens emitted",
        ("tokens", *methods),
        [
            [str(length), *(str(figures["acceptance_histogram"].get(length, 0)) for figures in methods.values())]
            for length in range(1, longest + 1)
        ],
    )


def _difference_tables(methods: Mapping[str, Any]) -> list[ReportTable]:
    rows = [
        [
            name,
            difference["prompt"],
            str(difference["position"]),
            f"{difference['gap']:.3g}",
            f"{difference['gap_in_roundings']:.1f}",
        ]
        for name, figures in methods.items()
        for difference in figures["agreement"]["differences"]
    ]
    header = ("method", "prompt", "first position", "top-2 logit gap", "in roundings of the dtype")
    return [ReportTable("Outputs that differ from the target alone", header, rows)] if rows else []


def _shape_tables(report: Mapping[str, Any]) -> list[ReportTable]:
    share = report["share_of_bandwidth"]
    rows = [
        ["one step of `generate`", f"{_spread(report['step_milliseconds'])} ms"],
        ["tokens/s of `generate`", f"{report['tokens_per_second']:.1f}"],
        *(
            [f"round efficiency, {way}", _share(figures["round_efficiency"])]
            for way, figures in report["round"].items()
        ),
        *(
            [f"first {FIRST_ROUNDS} rounds of a call, {row['way']}", f"{row['first_rounds_milliseconds']:.1f} ms"]
            for row in report["rounds"]
            if row["simulated_tau"] == report["rounds"][0]["simulated_tau"]
        ),
        ["memory bandwidth of a copy", f"{report['bandwidth_gigabytes_per_second']:.1f} GB/s"],
        *([f"share of this bandwidth, {name}", _share(value)] for name, value in share.items()),
        *([f"peak memory, {name}", f"{_megabytes(value)} MB"] for name, value in report["peak_memory_bytes"].items()),
        ["weights of the draft", f"{_megabytes(report['draft_weight_bytes'])} MB"],
    ]
    tables = [
        ReportTable(
            "SIMULATED acceptance: the weights are random, and so are the tokens; only times are real",
            ("rounds", "tau", "ms", "in steps of `generate`", "tokens/s", "speedup, decode only"),
            [
                [
                    row["way"],
                    f"{row['simulated_tau']:.2f}",
                    _spread(row["milliseconds"]),
                    _spread(row["cost_in_steps"]),
                    f"{row['simulated_tokens_per_second']:.1f}",
                    _spread(row["simulated_decode_speedup"]),
                ]
                for row in report["rounds"]
            ],
        ),
        ReportTable("Further measurements", ("", "median (quartiles)"), rows),
        _round_table({way: figures["round_milliseconds"] for way, figures in report["round"].items()}),
    ]
    if report["verification"]:
        tables.append(
            ReportTable(
                "Verification of a tree",
                ("nodes", "ms", "in steps of `generate`"),
                [
                    [str(row["nodes"]), f"{row['milliseconds']:.2f}", f"{row['steps']:.2f}"]
                    for row in report["verification"]
                ],
            )
        )
    return tables


def _round_table(milliseconds: Mapping[str, Mapping[str, float]]) -> ReportTable:
    totals = {name: sum(parts.values()) for name, parts in milliseconds.items()}
    rows = [
        [part, *(f"{parts[part]:.2f} ({parts[part] / totals[name]:.0%})" for name, parts in milliseconds.items())]
        for part in PARTS.values()
    ]
    rows.append(["round", *(f"{total:.2f}" for total in totals.values())])
    return ReportTable("Where the time of a round goes, in ms (share)", ("part", *milliseconds), rows)


def _spread(values: Mapping[str, float]) -> str:
    return (
        f"{_number(values['median'])} ({_number(values['lower_quartile'])}-{_number(values['upper_quartile'])})"
        if not math.isnan(values["median"])
        else "-"
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"


def _depth(rows: Sequence[Mapping[str, float]], level: int) -> str:
    return f"{rows[level]['share']:.2f} ({rows[level]['given_parent']:.2f})" if level < len(rows) else ""


__all__ = ["ReportTable", "agreement_tables", "report_tables"]
