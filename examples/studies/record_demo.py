"""
Records what `msd-hf demo` prints, with its colours, as the picture that README shows.

    python examples/studies/record_demo.py
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


PICTURE = Path(__file__).parents[1] / "demo.svg"
COLUMNS = 88
FONTS = "DejaVu Sans Mono, Menlo, Consolas"  # about as wide as the font that rich counts with


def record(
    output: Annotated[Path, typer.Option(help="SVG file that is written.")] = PICTURE,
) -> None:
    """Run `msd-hf demo` and write what it prints as an SVG."""
    # Without a terminal rich prints no colours and uses 80 columns.
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "msd_hf", "demo"]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print("[dim]$[/dim] [bold]msd-hf demo[/bold]")
    console.print(Text.from_ansi(printed.rstrip()))
    svg = console.export_svg(title="msd-hf demo", unique_id="demo")
    # Browsers load no web fonts for an SVG that a page shows as an image: use a font that the reader has.
    svg = re.sub(r"@font-face \{.*?\}\n*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: Fira Code,", f"font-family: {FONTS},", svg)
    output.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(record)
