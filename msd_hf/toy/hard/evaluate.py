"""How many held-out questions the target of the hard world answers right: `python -m msd_hf.toy.hard.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import errors_end_script
from ...loading import load_target_and_processor
from ...terminal import make_console
from ..accuracy import accuracy_table, generate_answers, score_answers
from . import TARGET_DIR
from .dataset import KIND_GROUPS, make_evaluation_prompts


def print_accuracy(
    folder: Annotated[Path, typer.Option("--target", help="Folder of the target.")] = TARGET_DIR,
    prompts_per_kind: Annotated[int, typer.Option(min=1, help="Held-out questions of each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
) -> None:
    """Print the share of greedy answers on the test split that hold all facts asked for, by kind of question."""
    prompts = make_evaluation_prompts(prompts_per_kind, seed)
    target, processor = load_target_and_processor(folder)
    answers = generate_answers(target, processor, prompts, max_new_tokens=200)
    make_console(width=100).print(accuracy_table(score_answers(prompts, answers), KIND_GROUPS))


if __name__ == "__main__":
    with errors_end_script():
        typer.run(print_accuracy)
