"""The command `msd-hf export`, which writes a draft for another engine."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import one_line
from .next_step import print_command
from .options import OptionalTarget, console


class Engine(str, Enum):
    """Engines that drafts can be exported to."""

    vllm = "vllm"


def export(
    draft: Annotated[str, typer.Argument(help="Folder or Hub id of the draft.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Engine, typer.Option(help="Engine that will serve the draft.")],
    target: OptionalTarget = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder, if it holds only an exported draft.")
    ] = False,
) -> None:
    """Write a draft as a folder that another engine serves."""
    from transformers.utils import logging

    from ..decoders import head_of
    from ..draft.auto import AutoDraft
    from ..engines.vllm.export import export_draft
    from ..engines.vllm.folder import EXPORT_FOLDER
    from ..engines.vllm.refusals import check_exportable, check_target_kind
    from ..hub.fingerprint import why_another_target
    from ..hub.names import is_hub_id, target_or_named
    from ..loading import load_config, load_target
    from ..target.support import check_pair
    from ..writing.destination import check_destination

    check_destination(output, EXPORT_FOLDER, overwrite)
    logging.disable_progress_bar()
    model = AutoDraft.from_pretrained(draft)
    check_exportable(model)
    head = vocab_size = None
    if model.draft_vocab is not None:
        target = target_or_named(target, model.config)
    if target is not None:
        config = load_config(target)
        check_target_kind(config)
        check_pair(config, model.config)
        vocab_size = config.get_text_config(decoder=True).vocab_size
    if model.draft_vocab is not None and target is not None:
        loaded = load_target(target)
        other = why_another_target(model.config, loaded)
        if other is not None:
            console.print(f"Warning: {one_line(other)}", soft_wrap=True)
        head = head_of(loaded)
    export_draft(model, output, head, vocab_size, overwrite)
    size = "" if model.draft_vocab is None else f", {len(model.draft_vocab):,} rows of the target's head"
    console.print(f"Wrote {output} ({model.num_parameters():,} parameters{size}).", soft_wrap=True)
    if getattr(model.generation_config, "max_visual_rows", None) is not None:
        console.print("vLLM feeds the draft every visual position: `max_visual_rows` does not count there.")
    named = model.config.target_name_or_path
    speculative = {"method": "eagle", "model": str(output), "num_speculative_tokens": 5}
    print_command(
        "vllm",
        "serve",
        target or (named if is_hub_id(named) else "TARGET"),
        "--speculative-config",
        json.dumps(speculative),
    )


__all__ = ["export"]
