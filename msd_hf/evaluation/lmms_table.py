"""Tables of runs of lmms-eval: for each task the scores with and without the draft, tau and speedup."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MSDError
from .lmms_results import SETTINGS, LmmsRun, LmmsSample
from .report_tables import ReportTable


SCORE_HEADER = ("task", "metric", "alone", "draft", "equal")
SPEED_HEADER = ("task", "same answers", "tokens", "tau", "speedup", "whole evaluation")
_UNKNOWN = "-"


@dataclass(frozen=True)
class TaskComparison:
    """
    A task with and without the draft.

    Args:
        task (`str`): name of the task.
        drafted (`LmmsRun`): the run with the draft.
        alone (`LmmsRun`, *optional*): the run of the target alone.
    """

    task: str
    drafted: LmmsRun
    alone: LmmsRun | None

    def scores(self) -> Iterable[tuple[str, float | None, float]]:
        """For each metric its name, the score of the target alone and the score with the draft."""
        before = {} if self.alone is None else self.alone.scores[self.task]
        for metric, score in self.drafted.scores[self.task].items():
            yield metric, before.get(metric), score

    def pairs(self) -> list[tuple[LmmsSample, LmmsSample]]:
        """The samples that both runs have: that of the target alone and that with the draft."""
        if self.alone is None:
            return []
        before = {sample.identity: sample for sample in self.alone.samples[self.task]}
        samples = self.drafted.samples[self.task]
        return [(before[sample.identity], sample) for sample in samples if sample.identity in before]

    def same_answers(self) -> str:
        """How many of the shared samples have the same answer, as `24/24`."""
        pairs = self.pairs()
        same = sum(alone.answer == drafted.answer for alone, drafted in pairs)
        return f"{same}/{len(pairs)}" if pairs else _UNKNOWN

    def recorded(self) -> list[Mapping[str, Any]]:
        """The records of the answers with the draft."""
        return [sample.counts for sample in self.drafted.samples[self.task] if sample.counts is not None]

    def tokens(self) -> float:
        """Mean number of tokens of an answer."""
        counts = self.recorded()
        return sum(count["output_tokens"] for count in counts) / len(counts) if counts else math.nan

    def tau(self) -> float:
        """Mean number of tokens that a verification emitted, over all verifications of the task."""
        counts = [count for count in self.recorded() if count.get("rounds")]
        rounds = sum(count["rounds"] for count in counts)
        return sum(count["tau"] * count["rounds"] for count in counts) / rounds if rounds else math.nan

    def speedup(self, seconds: str) -> float:
        """Tokens/s with the draft over tokens/s of the target alone, on the samples for which both are recorded.

        Args:
            seconds: the field of the records: `"seconds"` of `generate`, or `"evaluation_seconds"`.
        """
        pairs = [(a.counts, b.counts) for a, b in self.pairs() if a.counts is not None and b.counts is not None]
        rates = []
        for side in zip(*pairs, strict=True):
            spent = sum(counts[seconds] for counts in side)
            rates.append(sum(counts["output_tokens"] for counts in side) / spent if spent > 0 else math.nan)
        return rates[1] / rates[0] if rates and rates[0] > 0 else math.nan

    def notes(self) -> list[str]:
        """What is missing in the row of this task, and how to get it."""
        found = []
        if self.alone is None:
            found.append(f"{self.task}: no run of the target alone. Run the same command without `draft=`.")
        elif not self.pairs():
            found.append(f"{self.task}: the runs share no logged sample. Add --log_samples to both.")
        if missing := len(self.drafted.samples[self.task]) - len(self.recorded()):
            found.append(f"{self.task}: {missing} answers have no record, because their call failed or was cached.")
        return found


def compare_runs(runs: Sequence[LmmsRun]) -> list[TaskComparison]:
    """
    Finds for each task the run with a draft and the run of the same target without one. Of runs that were repeated the
    last one counts.

    Args:
        runs: in the order of their dates.

    Raises:
        MSDError: when no run has a draft.
    """
    alone: dict[Any, LmmsRun] = {}
    drafted: dict[Any, LmmsRun] = {}
    for run in runs:
        for task in run.scores:
            key = (run.model, run.arguments, run.settings, task)
            if run.draft is None:
                alone[key] = run
            else:
                drafted[run.draft, key] = run
    if not drafted:
        raise MSDError("No run has a draft: run the same command of lmms-eval with `draft=DRAFT` in --model_args.")
    return [TaskComparison(key[-1], run, alone.get(key)) for (_, key), run in drafted.items()]


def lmms_tables(comparisons: Iterable[TaskComparison]) -> list[ReportTable]:
    """Two tables for each target, draft and setting: the scores, and the speed of each task."""
    groups: dict[str, list[TaskComparison]] = {}
    for comparison in comparisons:
        groups.setdefault(_described(comparison.drafted), []).append(comparison)
    tables = []
    for title, group in groups.items():
        tables.append(ReportTable(title, SCORE_HEADER, [row for one in group for row in _score_rows(one)]))
        tables.append(ReportTable("Speed with the draft", SPEED_HEADER, [_speed_row(one) for one in group]))
    return tables


def _described(run: LmmsRun) -> str:
    settings = zip(SETTINGS[:-1], run.settings, strict=False)  # the seed is hardly ever set
    given = [f"{name} {value}" for name, value in settings if value]
    return f"{run.model}: {', '.join([*run.arguments, f'draft={run.draft}', *given])}"


def _score_rows(comparison: TaskComparison) -> list[list[str]]:
    return [
        [
            comparison.task,
            metric,
            _UNKNOWN if before is None else f"{before:.4g}",
            f"{after:.4g}",
            _equal(before, after),
        ]
        for metric, before, after in comparison.scores()
    ]


def _speed_row(comparison: TaskComparison) -> list[str]:
    return [
        comparison.task,
        comparison.same_answers(),
        _number(comparison.tokens(), "{:.1f}".format),
        _number(comparison.tau(), "{:.2f}".format),
        _number(comparison.speedup("seconds"), "{:.2f}".format),
        _number(comparison.speedup("evaluation_seconds"), "{:.2f}".format),
    ]


def _equal(before: float | None, after: float) -> str:
    if before is None:
        return _UNKNOWN
    return "yes" if before == after or (math.isnan(before) and math.isnan(after)) else "no"


def _number(value: float, form: Callable[[float], str]) -> str:
    return _UNKNOWN if math.isnan(value) else form(value)


__all__ = ["TaskComparison", "compare_runs", "lmms_tables"]
