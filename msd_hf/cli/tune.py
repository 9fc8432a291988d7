"""The command `msd-hf tune`, which finds out how a published draft should be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import MSDError
from .checkpoints import keep_documents
from .next_step import print_next
from .options import Device, Dtype, ImageFolder, MaxNewTokens, OptionalTarget, Overwrite, Split, Subset, console


if TYPE_CHECKING:
    from ..evaluation.tuning import Trial, TuneResult


def tune(
    draft: Annotated[str, typer.Option(help="Folder or Hub id of the draft. It stays as it is.")],
    data: Annotated[
        str,
        typer.Option(
            help="What is asked, as in `msd-hf bench`: prompts or conversations, pictures among them if used."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the draft with the best values.")],
    target: OptionalTarget = None,
    split: Split = None,
    subset: Subset = None,
    image_folder: ImageFolder = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Questions.")] = 20,
    max_new_tokens: MaxNewTokens = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Try how a draft's configuration should be read (layers, norms, theta, pictures), and save the best reading."""
    from transformers.utils import logging

    from ..draft.auto import AutoDraft
    from ..draft.folder import DRAFT_FOLDER
    from ..draft.refitted import with_fields
    from ..evaluation.bench_prompts import first_questions
    from ..evaluation.tuning import tune_draft
    from ..hub.names import target_or_named
    from ..loading import load_config, load_processor, load_target
    from ..target.support import check_pair
    from ..training.data.conversations import load_conversations
    from ..writing.destination import check_destination, replaced_folder

    folder, own = output.expanduser(), Path(draft).expanduser()
    if folder.exists() and own.exists() and folder.samefile(own):
        raise MSDError(f"--output {str(output)!r} is the folder of --draft, which stays as it is: give another one.")
    check_destination(output, DRAFT_FOLDER, overwrite)
    logging.disable_progress_bar()
    given = AutoDraft.from_pretrained(draft)
    target = target_or_named(target, given.config)
    check_pair(load_config(target), given.config)
    processor = load_processor(target)
    conversations = load_conversations(data, image_folder, split=split, subset=subset, needs_answer=False)
    prompts = first_questions(conversations, processor, num_prompts)
    model = load_target(target, dtype, device)
    result = tune_draft(model, given, prompts, max_new_tokens, show_progress=console.is_terminal)
    _print_result(result)
    with replaced_folder(output, DRAFT_FOLDER, overwrite) as temporary:
        with_fields(given, **result.fields).save_pretrained(temporary)
        names = ", ".join(f"`{name}`" for name in result.fields)
        keep_documents(draft, temporary, f"{names} changed since. Figures above are older." if names else None)
    console.print(f"Wrote {output}", soft_wrap=True)
    print_next("bench", "--target", target, "--draft", output, "--data", data)


def _print_result(result: TuneResult) -> None:
    table = Table(show_edge=False, pad_edge=False)
    for name, justify in (("field", "left"), ("value", "left"), ("tau", "right"), ("", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    last = None
    for trial in result.trials:
        if trial.is_present and last is not None:
            table.add_section()
        last = trial
        tau = f"{trial.tau:.3f}" if trial.tau else "refused"
        style = "bold" if trial.is_kept else None
        table.add_row(trial.field if trial.is_present else "", _shown(trial), tau, _verdict(trial), style=style)
    console.print(table)
    for field in result.untried:
        console.print(f"`{field}` was not tried: no prompt has a picture.", soft_wrap=True)
    if not result.fields:
        console.print(f"Nothing is better than the draft as it is: tau {result.tau:.3f} in chains.", soft_wrap=True)
        return
    changes = ", ".join(f"{name}={json.dumps(value)}" for name, value in result.fields.items())
    before = f"{result.tau_before:.3f}" if result.tau_before else "no draft"
    console.print(f"tau {before} -> {result.tau:.3f} in chains, with {changes}", soft_wrap=True)


def _shown(trial: Trial) -> str:
    value: Any = trial.value
    if isinstance(value, dict) and set(value) <= {"rope_type", "rope_theta"}:
        return f"theta {value['rope_theta']:,.0f}"
    return "default" if value is None else json.dumps(value)


def _verdict(trial: Trial) -> str:
    if trial.is_kept:
        return "stays" if trial.is_present else "better"
    return "before" if trial.is_present else ""


__all__ = ["tune"]
