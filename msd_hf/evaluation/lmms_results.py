"""Reads the results of lmms-eval: the scores of each run, and tokens, rounds and seconds of each sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MSDError, describe_error


RESULTS_SUFFIX = "_results.json"
MODEL_PREFIX = "msd_"  # of the models that record, see `msd_hf/engines/lmms_eval`
# Settings of a run that decide what is asked and how it is answered.
SETTINGS = ("limit", "offset", "gen_kwargs", "torch_seed")


@dataclass(frozen=True)
class LmmsSample:
    """
    One answer of a run.

    Args:
        identity (`tuple`): number and hash of the question, the same in each run.
        answer (`str`): the answer, as the model gave it.
        counts (`Mapping`, *optional*): what the model recorded; `None` if the answer came from a cache or its call
            failed.
    """

    identity: tuple[Any, ...]
    answer: str
    counts: Mapping[str, Any] | None


@dataclass(frozen=True)
class LmmsRun:
    """
    One run of lmms-eval.

    Args:
        date (`str`): when it was started, in a form that sorts.
        model (`str`): name of the model of lmms-eval.
        arguments (`tuple[str, ...]`): `--model_args`, sorted, without the draft.
        draft (`str`, *optional*): the draft; `None` for a run of the target alone.
        settings (`tuple[str, ...]`): `--limit`, `--offset`, `--gen_kwargs` and the seed; empty where none was given.
        scores (`dict[str, dict[str, float]]`): task -> metric -> score.
        samples (`dict[str, list[LmmsSample]]`): task -> samples; empty if the run did not log them.
    """

    date: str
    model: str
    arguments: tuple[str, ...]
    draft: str | None
    settings: tuple[str, ...]
    scores: dict[str, dict[str, float]]
    samples: dict[str, list[LmmsSample]]


def read_runs(paths: Iterable[Path]) -> list[LmmsRun]:
    """
    Reads runs of the models of this package.

    Args:
        paths: folders that hold results, at any depth, or files `*_results.json`.

    Returns:
        The runs, in the order of their dates.

    Raises:
        MSDError: when there are no results, or a file is broken.
    """
    given = list(paths)
    files = sorted({file.resolve(): file for path in given for file in _results_files(path)}.values())
    runs = [run for file in files for run in _read_run(file)]
    if not runs:
        found = f"{len(files)} files of results, none" if files else f"no file *{RESULTS_SUFFIX}, and so none"
        raise MSDError(
            f"{', '.join(map(str, given))}: {found} of a model of msd-hf. Run lmms-eval with --model msd_llava (or "
            "another of its models), --output_path and --log_samples."
        )
    return sorted(runs, key=lambda run: run.date)


def _results_files(path: Path) -> list[Path]:
    if path.is_dir():
        return list(path.rglob(f"*{RESULTS_SUFFIX}"))
    if not path.is_file():
        raise MSDError(f"--lmms-eval {str(path)!r}: there is no such file or folder.")
    if not path.name.endswith(RESULTS_SUFFIX):
        raise MSDError(f"--lmms-eval {str(path)!r}: give the folder, or its files *{RESULTS_SUFFIX}.")
    return [path]


def _read_run(file: Path) -> Iterator[LmmsRun]:
    """The run of a file, if a model of this package made it."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        config = results["config"]
        if not str(config["model"]).startswith(MODEL_PREFIX):
            return
        arguments = _arguments(config["model_args"])
        scores = {task: _scores(figures) for task, figures in results["results"].items()}
        date = file.name.removesuffix(RESULTS_SUFFIX)
        yield LmmsRun(
            date=date,
            model=config["model"],
            arguments=tuple(argument for argument in arguments if not argument.startswith("draft=")),
            draft=next((text.partition("=")[2] for text in arguments if text.startswith("draft=")), None),
            settings=tuple(",".join(_arguments(config.get(name))) for name in SETTINGS),
            scores=scores,
            samples={task: _samples(file.with_name(f"{date}_samples_{task}.jsonl")) for task in scores},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise MSDError(f"{file} cannot be read as results of lmms-eval: {describe_error(error)}") from error


def _arguments(given: Any) -> list[str]:
    """The parts of `name=value,name=value`, which may also be given as a mapping, sorted."""
    if isinstance(given, Mapping):
        return sorted(f"{name}={value}" for name, value in given.items())
    return sorted(part.strip() for part in str(given or "").split(",") if part.strip())


def _scores(figures: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a task by metric. The keys of lmms-eval are `metric,filter`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if "_stderr" not in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _samples(file: Path) -> list[LmmsSample]:
    if not file.is_file():
        return []
    # Not `splitlines`, which also breaks at characters that JSON may hold.
    lines = file.read_text(encoding="utf-8").split("\n")
    return [_sample(json.loads(line)) for line in lines if line.strip()]


def _sample(entry: Mapping[str, Any]) -> LmmsSample:
    answer = entry.get("resps", entry["filtered_resps"])
    counts = (entry.get("token_counts") or [None])[0]
    has_record = isinstance(counts, Mapping) and "seconds" in counts
    return LmmsSample((entry["doc_id"], entry.get("doc_hash")), json.dumps(answer), counts if has_record else None)


__all__ = ["MODEL_PREFIX", "RESULTS_SUFFIX", "SETTINGS", "LmmsRun", "LmmsSample", "read_runs"]
