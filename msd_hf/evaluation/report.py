"""Prints a report on the terminal, and writes it as files: `report.json`, `report.md` and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..writing.saving import replace_text
from .plots import draw_plots
from .report_tables import ReportTable, report_tables


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Prints the settings, the tables and the warnings of a report."""
    console.print(_describe(report), soft_wrap=True)
    for table in report_tables(report):
        console.print()
        print_table(table, console)
    for warning in report.get("warnings", ()):
        console.print(Text("\nWarning: ", style="bold yellow") + Text(warning), soft_wrap=True)


def print_table(table: ReportTable, console: Console) -> None:
    """Prints one table."""
    shown = Table(title=table.title, title_justify="left", show_edge=False, pad_edge=False)
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def write_report(report: Mapping[str, Any], folder: Path, plots: bool) -> list[Path]:
    """
    Writes `report.json`, `report.md` and, with `plots`, plots to a folder.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = draw_plots(report, folder) if plots else []
    replace_text(folder / "report.json", json.dumps(_without_nan(report), indent=1, allow_nan=False) + "\n")
    replace_text(folder / "report.md", to_markdown(report, images))
    return [folder / "report.json", folder / "report.md", *images]


def to_markdown(report: Mapping[str, Any], images: Sequence[Path] = ()) -> str:
    """A report as a Markdown page with `images` at its end."""
    environment = report["environment"]
    parts = ["# Benchmark", _describe(report), f"```\n{environment['command']}\n```"]
    parts += [f"> **Warning**: {warning}" for warning in report.get("warnings", ())]
    for table in report_tables(report):
        parts += [f"## {table.title}", _markdown_table(table)]
    if report["kind"] == "pair":
        described = [f"- {name}: {figures['description']}" for name, figures in report["methods"].items()]
        parts += ["## Methods and terms", "\n".join(described), _TERMS]
    parts += [f"![{image.stem.replace('-', ' ')}]({image.name})" for image in images]
    return "\n\n".join(parts) + "\n"


_TERMS = """\
- tokens/s: tokens of all answers divided by the time of all calls, vision tower and prefill included. Decode only:
  without the target's first forward and without its token.
- tau: mean number of tokens that a verification emits, the bonus token included; accepted: tau - 1.
- efficiency: share of the decoding loop that is spent in the modules of target and draft, the head included.
  Efficiency and the parts of a round are measured in a separate run. On a GPU the host waits at the border of each
  part there, so that the parts add up to more than a round of the timed runs.
- peak memory: peak of the allocator on a GPU, else of the process. It includes the weights of both models for every
  method.
- identical: answers with the same tokens as the answers of the target alone."""


def _describe(report: Mapping[str, Any]) -> str:
    environment = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    return (
        f"{environment['device']}, {environment['threads']} threads of {environment['cpu_cores']} cores, "
        f"{environment['dtype']}, {environment['attention']} attention; {versions}.\n{settings}."
    )


def _markdown_table(table: ReportTable) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(str(text).replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def _without_nan(value: Any) -> Any:
    """Replaces `nan` and infinity, which JSON does not have, by `None`."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["print_report", "print_table", "to_markdown", "write_report"]
