"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..loading import DTYPE_NAMES


console = Console(highlight=False)

Target = Annotated[str, typer.Option(help="Folder or Hub id of the target.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of the answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 for greedy decoding, above for sampling.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Dtype = Annotated[str, typer.Option(help=f"{DTYPE_NAMES}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; auto: the GPU if there is one.")]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the data's.")
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a sample, expanded images included.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward of the target.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first broken sample.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs with and without the draft, of which medians count.")]


def print_skipped(skipped: Mapping[str, int]) -> None:
    """How many samples were left out, by reason."""
    for reason, count in skipped.items():
        console.print(f"skipped {count:,}: {reason}")
