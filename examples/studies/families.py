"""
Tries every family of the installed transformers as a target: for each entry of the mappings of image-text and of
causal language models the smallest model is built, and `generate` is compared with and without a draft: text and an
image, greedy and sampled with the same seed, in float64 where the family computes in it.

    python examples/studies/families.py --training --write      # all of them, 2 to 6 minutes on one core
    python examples/studies/families.py --only llava qwen3_5

With `--write` the table is `examples/FAMILIES.md`. Exit status 1 if a family fails. Each family runs in a process of
its own, one at a time. The rules that make models small are in `survey_configs.py`, what they cannot guess in
`survey_table.py`; a family that is new in transformers and that the rules cannot build is "untried".
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from survey_page import write_page
from survey_pairs import IMAGE_CLASSES, TEXT_CLASSES, describe
from survey_rows import FAILED, Row, find_row


PAGE = Path(__file__).parents[1] / "FAMILIES.md"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some families, by model_type")
    parser.add_argument("--training", action="store_true", help="train a draft of each family for some steps")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--limit", type=int, default=120, help="seconds a family (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write needs all families: leave --only out")
    return arguments


def all_families() -> list[str]:
    return [*IMAGE_CLASSES, *(name for name in TEXT_CLASSES if name not in IMAGE_CLASSES)]


def find_in_process(model_type: str, training: bool, limit: int) -> Row:
    """The row of a family, found in a process of its own, so that a crash or a hang ends nothing else."""
    read, write = os.pipe()
    process = os.fork()  # a new interpreter would take seconds for its imports
    if process == 0:
        status = 1
        try:
            os.close(read)
            signal.alarm(limit)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            with os.fdopen(write, "w") as pipe:
                json.dump(asdict(_find(model_type, training)), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    if text:
        return Row(**json.loads(text))
    reason = f"took longer than {limit} s" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else ""
    return Row(model_type, status=FAILED, note=reason or f"its process ended with status {status}")


def _find(model_type: str, training: bool) -> Row:
    try:
        return find_row(model_type, training)
    except BaseException as error:
        return Row(model_type, status=FAILED, note=describe(error))


def show(row: Row, seconds: float) -> None:
    figures: list[Any] = []
    if row.tau is not None:
        figures += [f"tau {row.tau:.2f}", f"logits {row.deviation:.0e}", row.dtype]
    if row.loss is not None:
        figures.append("loss {:.3f} -> {:.3f}".format(*row.loss))
    outcomes = f"text: {row.text[:150]}, image: {row.image[:400]}"
    print(
        f"{row.model_type:24} {row.status:9} {seconds:5.1f} s  {outcomes}  {' '.join(figures)}  {row.note[:300]}",
        flush=True,
    )


def main() -> None:
    arguments = parse_arguments()
    unknown = set(arguments.only or ()) - set(all_families())
    if unknown:
        sys.exit(f"Unknown to transformers {transformers.__version__}: {', '.join(sorted(unknown))}")
    rows, first = [], time.monotonic()
    for model_type in arguments.only or all_families():
        start = time.monotonic()
        rows.append(find_in_process(model_type, arguments.training, arguments.limit))
        show(rows[-1], time.monotonic() - start)
    counts = collections.Counter(row.status for row in rows)
    print(
        f"{time.monotonic() - first:.0f} s:", ", ".join(f"{count} {status}" for status, count in counts.most_common())
    )
    if arguments.write:
        write_page(PAGE, rows, len(IMAGE_CLASSES))
    sys.exit(bool(counts[FAILED]))


if __name__ == "__main__":
    main()
