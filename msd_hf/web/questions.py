"""Questions as the input of the page holds them, and those of the toy world to click on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images import read_image
from ..toy import DEMO_IMAGE, make_prompts


if TYPE_CHECKING:
    from PIL.Image import Image

_KINDS = ("describe", "count", "compare", "howto", "story")  # one held-out question each


def asked_question(folder: Path, name: str, text: str, image: Image | None) -> dict[str, Any]:
    """
    A question as gradio's `MultimodalTextbox` holds it.

    Args:
        folder, name: where the picture is written, because gradio serves files from temporary folders only.
        text: the question.
        image (*optional*): the picture.

    Returns:
        `{"text": question, "files": [path of the picture]}`; `files` is empty without a picture.
    """
    if image is None:
        return {"text": text, "files": []}
    path = folder / f"{name}.png"
    image.save(path)
    return {"text": text, "files": [str(path)]}


def example_questions(folder: Path) -> list[dict[str, Any]]:
    """Questions with and without pictures, which are drawn to a folder."""
    held_out = [prompt for kind in _KINDS for prompt in make_prompts("test", 1, 1, kind)]
    return [
        asked_question(folder, "demo", "Describe the picture.", read_image(DEMO_IMAGE)),
        *(asked_question(folder, prompt.kind, prompt.question, prompt.image) for prompt in held_out),
    ]


__all__ = ["asked_question", "example_questions"]
