"""Options that several commands share, and the console that they print to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..limits import DTYPE_NAMES, LARGEST_SEED
from ..terminal import make_console


if TYPE_CHECKING:
    from ..draft.modeling_msd import MSDDraftModel

console = make_console()


def check_finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Target = Annotated[str, typer.Option(help="Folder or Hub id of the target.")]
OptionalTarget = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the target; default: the one that the draft names.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder, if it holds only a draft.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of the answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, callback=check_finite, help="0 for greedy decoding, above 0 for sampling.")
]
MaxVisualRows = Annotated[
    str | None,
    typer.Option(help="Most visual positions that the draft reads: a number, auto or all; default: as it is saved."),
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of sampling.")]
Dtype = Annotated[str, typer.Option(help=f"{DTYPE_NAMES}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; auto: the GPU if there is one.")]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the folder of the data.")
]
Split = Annotated[
    str | None, typer.Option(help="Split of a data set that is no file; default: train, or the only one.")
]
Subset = Annotated[str | None, typer.Option(help="Subset (configuration) of a data set of the Hub.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Longest sample in tokens, expanded images included.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward of the target.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first broken sample.")]
REPEATS_HELP = "Timed runs with and without the draft; their medians are reported."
Repeats = Annotated[int, typer.Option(min=1, help=REPEATS_HELP)]


def set_visual_rows(draft: MSDDraftModel, value: str | None) -> None:
    """Sets what `--max-visual-rows` asks for."""
    from ..drafting.visual_rows import most_visual_rows

    if value is not None:
        number = int(value) if value.isdecimal() else value
        draft.generation_config.max_visual_rows = None if value == "all" else number
        most_visual_rows(draft.generation_config, None)  # refuses other words


def print_skipped(skipped: Mapping[str, int]) -> None:
    """Prints the number of skipped samples by reason."""
    for reason, count in skipped.items():
        console.print(f"skipped {count:,}: {reason}")
