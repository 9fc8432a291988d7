"""The bundled demo picture: `python -m msd_hf.toy.demo` draws it again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from . import DEMO_IMAGE
from .world import MAX_OBJECTS, Scene, make_scene, render


def demo_scene() -> Scene:
    """A held-out scene of four objects with different shapes and colours."""
    return make_scene(random.Random("demo/19"), "test", MAX_OBJECTS)


def write_demo_image(
    output: Annotated[Path, typer.Option(help="PNG file that is written.")] = DEMO_IMAGE,
) -> None:
    """Write the demo picture (144x144 PNG)."""
    render(demo_scene()).save(output)


if __name__ == "__main__":
    typer.run(write_demo_image)
