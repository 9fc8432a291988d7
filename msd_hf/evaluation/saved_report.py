"""Reads `report.json` files again, and says in one sentence which of them is none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MSDError
from ..terminal import printable
from .methods import VANILLA
from .prompt_figures import median_speedup, rate_of, tau_of


REPORT_NAME = "report.json"
_LONGEST_LABEL = 32  # characters


@dataclass(frozen=True)
class SavedReport:
    """
    A report of prompts that was read from a file.

    Args:
        label: its short name in tables.
        content: the report.
    """

    label: str
    content: Mapping[str, Any]

    @property
    def prompts(self) -> dict[str, Mapping[str, Any]]:
        """What was measured on each prompt, by its name."""
        return {prompt["name"]: prompt for prompt in self.content["prompts"]}


def read_reports(paths: Sequence[Path]) -> list[SavedReport]:
    """
    Reads reports of prompts.

    Args:
        paths: the files, or the folders that `msd-hf bench --output` wrote them to.

    Raises:
        MSDError: when one of them cannot be read, or is no report of prompts.
    """
    files = [path / REPORT_NAME if path.is_dir() else path for path in paths]
    contents = [_read(file) for file in files]
    return [SavedReport(label, content) for label, content in zip(_labels(files), contents, strict=True)]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MSDError(f"The report {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise _no_report(path, "it is not JSON") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "shape":
        raise MSDError(f"{str(path)!r} is a report of --shape, which has no prompts: give reports of --data or --toy.")
    if kind != "pair":
        raise _no_report(path, "it does not say what it measured")
    try:
        _check(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _no_report(path, "a part of it is missing or broken") from error
    return content


def _check(content: Mapping[str, Any]) -> None:
    """Reads what a comparison reads, so that a broken report raises an error here."""
    prompts = content["prompts"]
    for method in content["methods"]:
        for prompt in prompts:
            median_speedup([prompt], method), rate_of([prompt], method), tau_of([prompt], method)
            (prompt["name"] + "", (prompt.get("answers") or {}).get(method, "") + "")
    content["methods"][VANILLA.name], prompts[0]
    for part in ("environment", "settings"):
        content[part].items()
    content["environment"]["versions"].items(), content.get("pair", {}).items()


def _no_report(path: Path, reason: str) -> MSDError:
    return MSDError(f"{str(path)!r} is no report of `msd-hf bench --output`: {reason}.")


def _labels(files: Sequence[Path]) -> list[str]:
    """A short name for each report: that of its folder for a file `report.json`, else that of the file."""
    labels = []
    seen: Counter[str] = Counter()
    for file in files:
        name = file.absolute().parent.name if file.name == REPORT_NAME else file.stem
        name = printable(name)[:_LONGEST_LABEL] or "report"
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels


__all__ = ["REPORT_NAME", "SavedReport", "read_reports"]
