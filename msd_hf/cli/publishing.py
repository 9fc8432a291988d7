"""The commands `msd-hf drafts`, `msd-hf card` and `msd-hf publish`: drafts of others, and a draft for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..terminal import make_console
from .next_step import print_next
from .options import console


_WIDEST = 10_000  # letters of a line

License = Annotated[str | None, typer.Option(help="Licence of the draft in the card, for example apache-2.0.")]
NewTarget = Annotated[
    str | None,
    typer.Option("--target", help="Hub id of the target, written into the draft if it does not name one."),
]
Language = Annotated[list[str] | None, typer.Option(help="A language in the card, such as en; repeat for more.")]


def drafts(
    target: Annotated[str | None, typer.Argument(help="Folder or Hub id of the target; default: all targets.")] = None,
    folder: Annotated[Path | None, typer.Option(help="A folder with drafts, each in a folder of its own.")] = None,
    hub: Annotated[bool, typer.Option("--hub/--no-hub", help="Ask the Hub for drafts that name the target.")] = True,
) -> None:
    """List drafts for a target: published ones, those in a folder, and those on the Hub."""
    from ..hub.finding import find_drafts

    result = find_drafts(target, folder, hub)
    if result.drafts:
        table = Table(title=None, show_edge=False, pad_edge=False)
        for column in ("draft", "made for", "kind", "licence", "found in"):
            table.add_column(column, overflow="fold")
        for draft in result.drafts:
            made_for = draft.target or "not recorded"
            if target is not None and not draft.is_exact:
                made_for = f"{made_for} (same kind and size)"
            table.add_row(draft.name, made_for, draft.kind, draft.license, draft.source)
        # A program that reads the list gets whole names.
        (console if console.is_terminal else make_console(width=_WIDEST)).print(table)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    if not result.drafts:
        console.print("No draft was found.")
        given = ["--target", target or "TARGET", "--text-data", "TEXT.json", "--visual-data", "VISUAL.json"]
        print_next("train", *given, "--output-dir", "DRAFT")
        return
    first = result.drafts[0]
    given = [] if target is None or first.is_exact else ["--target", target]
    print_next("generate", "--draft", first.name, *given, "--image", "PICTURE", "--prompt", "QUESTION")


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a draft.")],
    name: Annotated[str | None, typer.Option(help="Hub id that the card says to load; default: the folder.")] = None,
    license: License = None,
    language: Language = None,
    target: NewTarget = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that you have edited.")] = False,
) -> None:
    """Write the model card of a draft into its folder: use, training, measured figures."""
    from ..hub.card import write_card

    is_named = _name_target(folder, target)
    path = write_card(folder, name, overwrite, license=license, language=language)
    console.print(f"Wrote {path}.", soft_wrap=True)
    given = [] if is_named else ["--target", "TARGET"]
    print_next("bench", "--update-card", folder, *given, "--data", "CONVERSATIONS.json")


def _name_target(folder: Path, target: str | None) -> bool:
    """Writes the name of the target into a draft. Returns whether the draft names one of the Hub, and says so if not:
    on another machine the name of a folder is of no use."""
    from ..hub.naming import name_target

    is_named = name_target(folder, target)
    if not is_named:
        console.print(
            "The draft does not name a target on the Hub, so others cannot find it by its target, and its card cannot "
            "load one: add --target OWNER/NAME.",
            soft_wrap=True,
        )
    return is_named


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a draft.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license: License = None,
    language: Language = None,
    target: NewTarget = None,
) -> None:
    """Upload a draft with its card to the Hub. Only its own files are sent, without secrets and local paths."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from ..draft.modeling_msd import MSDDraftModel
    from ..hub.card import read_draft_config
    from ..hub.publishing import check_repo_id, publish_folder

    check_repo_id(repo)
    read_draft_config(folder)
    logging.disable_progress_bar()
    disable_progress_bars()
    MSDDraftModel.from_pretrained(folder)  # refuses a damaged draft
    is_named = _name_target(folder, target)
    url, names = publish_folder(folder, repo, private=private or None, license=license, language=language)
    console.print(f"Uploaded {', '.join(names)}.", soft_wrap=True)
    console.print(f"The draft is at {url}.", soft_wrap=True)
    given = [] if is_named else ["--target", "TARGET"]
    print_next("generate", "--draft", repo, *given, "--image", "PICTURE", "--prompt", "QUESTION")
