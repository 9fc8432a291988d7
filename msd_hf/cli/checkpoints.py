"""The commands `msd-hf convert` and `msd-hf draft-vocab`, which read a draft, change it and write it."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MSDError
from .next_step import print_command, print_next
from .options import ImageFolder, OptionalTarget, Overwrite, Strict, console, print_skipped


class DraftFormat(str, Enum):
    """Formats that `msd-hf convert` writes."""

    msd_hf = "msd-hf"
    flat = "eagle3-flat"
    speculators = "speculators"


def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a published MSD, EAGLE, EAGLE-3 or ViSpec draft.")
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        DraftFormat,
        typer.Option(help="Format: this package's; or, of an EAGLE-3 draft, the flat one or speculators'."),
    ] = DraftFormat.msd_hf,
    overwrite: Overwrite = False,
) -> None:
    """Write a published draft of any kind in this package's format, EAGLE-3 in others too."""
    from ..draft.auto import AutoDraft
    from ..draft.eagle3.formats import FORMAT_FOLDER, visual_positions_note, write_format
    from ..draft.folder import DRAFT_FOLDER
    from ..hub.names import is_hub_id
    from ..writing.destination import check_destination, replaced_folder

    is_ours = to == DraftFormat.msd_hf
    check_destination(destination, DRAFT_FOLDER if is_ours else FORMAT_FOLDER, overwrite)
    model = AutoDraft.from_pretrained(source)
    if not is_ours:
        write_format(model, destination, to.value, overwrite)
        console.print(f"Wrote {destination} ({model.num_parameters():,} parameters, {model.dtype}).", soft_wrap=True)
        note = visual_positions_note(model, to.value)
        if note is not None:
            console.print(note, soft_wrap=True)
        named = model.config.target_name_or_path
        target = named if is_hub_id(named) else "TARGET"
        speculative = {"method": "eagle3", "model": str(destination), "num_speculative_tokens": 5}
        print_command("vllm", "serve", target, "--speculative-config", json.dumps(speculative))
        return
    with replaced_folder(destination, DRAFT_FOLDER, overwrite) as temporary:
        model.save_pretrained(temporary)
        keep_documents(source, temporary)
    console.print(f"Wrote {destination} ({model.num_parameters():,} parameters, {model.dtype}).")
    print_next("generate", "--target", "TARGET", "--draft", destination, "--image", "PICTURE", "--prompt", "QUESTION")


def keep_documents(source: str, folder: Path, changed: str | None = None) -> None:
    """Copies the card and the record of the training from one draft to a draft that was made from it."""
    from ..draft.files import find_file
    from ..hub.card import CARD_NAME, PROVENANCE_NAME, copy_card

    for name in (PROVENANCE_NAME, CARD_NAME):
        with suppress(OSError):  # the Hub may be out of reach, with the weights in its cache
            path = find_file(source, name, {})
            if path is not None and name == CARD_NAME:
                copy_card(path, folder, changed)
            elif path is not None:
                shutil.copy(path, folder)


def draft_vocab(
    draft: Annotated[str, typer.Option(help="Folder or Hub id of its draft.")],
    data: Annotated[list[Path], typer.Option(help="Conversations, .json or .jsonl; repeat for more than one file.")],
    output: Annotated[Path, typer.Option(help="Folder to write the draft with the vocabulary to.")],
    target: OptionalTarget = None,
    image_folder: ImageFolder = None,
    size: Annotated[
        str, typer.Option(help="Number of tokens; auto: as few as cover 99.5% of the data, at most a quarter of all.")
    ] = "auto",
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Restrict the candidates of a draft to the tokens that are frequent in answers, so that drafting costs less."""
    from transformers.utils import logging

    from ..draft.folder import DRAFT_FOLDER
    from ..draft.modeling_msd import MSDDraftModel
    from ..hub.names import target_or_named
    from ..loading import load_config, load_processor
    from ..target.support import check_pair
    from ..training.data.conversations import load_conversations
    from ..training.draft_vocab import LARGEST_PAYING_SHARE, check_size, count_answer_tokens, coverage, frequent_tokens
    from ..writing.destination import check_destination, replaced_folder

    if size != "auto" and not size.lstrip("-").isdecimal():
        raise MSDError(f"--size {size!r} is neither a number nor auto.")
    num_tokens = None if size == "auto" else int(size)
    check_destination(output, DRAFT_FOLDER, overwrite)
    logging.disable_progress_bar()
    model = MSDDraftModel.from_pretrained(draft)
    target = target_or_named(target, model.config)
    target_config = load_config(target)
    vocab_size = target_config.get_text_config(decoder=True).vocab_size
    if num_tokens is not None:
        check_size(num_tokens, vocab_size)
    conversations = [load_conversations(path, image_folder) for path in data]
    check_pair(target_config, model.config)

    counts = count_answer_tokens(conversations, load_processor(target), vocab_size, strict)
    seen = counts.counted + counts.held_out
    console.print(
        f"{int(seen.sum()):,} answer tokens in {counts.num_samples:,} conversations, "
        f"{int((seen > 0).sum()):,} different ones"
    )
    print_skipped(counts.skipped)
    tokens = frequent_tokens(counts.counted, num_tokens)
    share = len(tokens) / vocab_size
    console.print(f"The draft's vocabulary has {len(tokens):,} of the target's {vocab_size:,} tokens ({share:.1%}).")
    console.print(f"covered       {coverage(counts.counted, tokens):.2%} of the answer tokens that ranked them")
    if int(counts.held_out.sum()):
        console.print(
            f"              {coverage(counts.held_out, tokens):.2%} of the answer tokens in held-out conversations"
        )
    if share > LARGEST_PAYING_SHARE:
        console.print(
            "Warning: more than half of the vocabulary saves little time and may cost acceptance.", soft_wrap=True
        )
    model.set_draft_vocab(tokens)
    with replaced_folder(output, DRAFT_FOLDER, overwrite) as temporary:
        model.save_pretrained(temporary)
        changed = f"This draft chooses candidates from {len(tokens):,} tokens only. Figures above are without that."
        keep_documents(draft, temporary, changed)
    console.print(f"Wrote {output}", soft_wrap=True)
    print_next("bench", "--target", target, "--draft", output, "--data", data[0])
