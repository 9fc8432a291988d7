"""The results of a benchmark, kept prompt by prompt beside its report, so that one that was killed goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..training.regeneration.journal import Journal, partial_path
from .comparison import Comparison
from .differences import Difference
from .observation import Observation
from .prompt_result import NAMELESS, PromptResult
from .round_timing import RoundTiming
from .timed_run import TimedRun


_NAME = "report-results"


class BenchJournal:
    """
    Holds the results of the prompts of one process, in `FOLDER/report-results.partial-PROCESS`.

    Args:
        folder: the folder of the report.
        terms: what the figures depend on. A journal of other terms is no part of this benchmark.
        process: the number of the process.

    Raises:
        MSDError: when the folder holds the journal of a benchmark with other terms, or cannot be written.
    """

    def __init__(self, folder: Path, terms: Mapping[str, Any], process: int = 0):
        self._journal = Journal(folder / _NAME, dict(terms), process)

    def results(self) -> dict[int, PromptResult | None]:
        """The results so far, by the number of the prompt, which they do not hold; `None` for a short answer."""
        records = list(self._journal.records())
        return {record["number"]: _from_record(record["result"]) for record in records}

    def add(self, number: int, result: PromptResult | None) -> None:
        """Keeps the result of a prompt, also if the benchmark is killed afterwards."""
        self._journal.append({"number": number, "result": None if result is None else _to_record(result)})

    @property
    def place(self) -> str:
        """How far the benchmark got, and how to go on, as a sentence."""
        kept = f"{self._journal.num_done:,} prompts are kept in {str(self._journal.path)!r}"
        return f"{kept}, and the same command goes on there."

    def __enter__(self) -> BenchJournal:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._journal.close()


def remove_journal(folder: Path, process: int = 0) -> None:
    """Removes the journal of a benchmark whose report is written."""
    partial_path(folder / _NAME, process).unlink(missing_ok=True)


def _to_record(result: PromptResult) -> dict[str, Any]:
    return {
        "prompt_length": result.prompt_length,
        "runs": {name: [asdict(run) for run in runs] for name, runs in result.comparison.runs.items()},
        "observations": {name: asdict(observation) for name, observation in result.observations.items()},
        "differences": {name: asdict(difference) for name, difference in result.differences.items()},
    }


def _from_record(record: Mapping[str, Any] | None) -> PromptResult | None:
    if record is None:
        return None
    return PromptResult(
        NAMELESS,
        record["prompt_length"],
        Comparison({name: [TimedRun(**run) for run in runs] for name, runs in record["runs"].items()}),
        {name: _observation(**fields) for name, fields in record["observations"].items()},
        {name: Difference(**fields) for name, fields in record["differences"].items()},
    )


def _observation(round_timing: Mapping[str, Any] | None, **fields: Any) -> Observation:
    return Observation(round_timing=None if round_timing is None else RoundTiming(**round_timing), **fields)


__all__ = ["BenchJournal", "remove_journal"]
