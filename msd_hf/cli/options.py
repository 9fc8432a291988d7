"""Options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ..errors import MSDError


console = Console(highlight=False)

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of the answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 for greedy decoding, above for sampling.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; auto: the GPU if there is one.")]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the data's.")
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a sample, expanded images included.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward of the target.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first broken sample.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs with and without the draft, of which medians count.")]


def load_target(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """A target and its processor."""
    resolved_dtype, resolved_device = parse_dtype(dtype), parse_device(device)
    processor = AutoProcessor.from_pretrained(name)
    return AutoModelForImageTextToText.from_pretrained(name, dtype=resolved_dtype).to(resolved_device), processor


def print_skipped(skipped: Mapping[str, int]) -> None:
    """How many samples were left out, by reason."""
    for reason, count in skipped.items():
        console.print(f"skipped {count:,}: {reason}")


def parse_dtype(name: str) -> torch.dtype | str:
    """The dtype of that name; "auto" as it is.

    Raises:
        MSDError: when there is none.
    """
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise MSDError(f"--dtype {name!r} is not known: use auto, float32, bfloat16, float16 or float64.")
    return dtype


def parse_device(name: str) -> torch.device:
    """The device of that name, or the one that there is.

    Raises:
        MSDError: when this machine has none of that name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MSDError(f"--device {name!r} cannot be used on this machine.") from error
    return device
