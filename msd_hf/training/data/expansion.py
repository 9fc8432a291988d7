"""The expansion of images in a text: a processor replaces an image token by many, so that the text after it moves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import MSDDataError


@dataclass(frozen=True)
class Stretch:
    """
    A piece of text that expansion does not change.

    Args:
        rendered: index of its first character in the rendered text.
        expanded: index of its first character in the expanded text.
        length: number of characters.
    """

    rendered: int
    expanded: int
    length: int


def align(rendered: str, expanded: str, image_tokens: Sequence[str]) -> list[Stretch]:
    """
    Finds the stretches of text before, between and after the images. The images lie between two stretches.

    Args:
        rendered: the text that the chat template wrote.
        expanded: the text that the tokenizer was given.
        image_tokens: tokens in `rendered` that may be expanded.

    Raises:
        MSDDataError: when the processor changed other text too.
    """
    borders = [0]
    if image_tokens:
        for match in re.finditer("|".join(map(re.escape, image_tokens)), rendered):
            borders += match.span()
    borders.append(len(rendered))
    stretches: list[Stretch] = []
    place = 0
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        piece = rendered[begin:end]
        if end == len(rendered):
            found = len(expanded) - len(piece) if expanded.endswith(piece) else -1
        else:
            found = expanded.find(piece, place)
        if found < place or (begin == 0 and found != 0):
            raise MSDDataError(
                "tokenization",
                f"the processor changes the text of a chat around its images: {piece[:80]!r} is not kept.",
            )
        stretches.append(Stretch(begin, found, len(piece)))
        place = found + len(piece)
    return stretches


def move(span: tuple[int, int], stretches: list[Stretch]) -> tuple[int, int]:
    """Translates the begin and the end of a span without images from the rendered to the expanded text."""
    begin, end = span
    for stretch in stretches:
        shift = stretch.expanded - stretch.rendered
        if stretch.rendered <= begin and end <= stretch.rendered + stretch.length:
            return begin + shift, end + shift
    raise MSDDataError("tokenization", f"characters {begin} to {end} of the chat hold an image.")


class TokenizerRecorder:
    """
    Wraps a tokenizer and keeps the text of its last call (`text`), the tokens (`ids`, long, `[L]`) and the begin and
    end of each token in characters (`offsets`, long, `[L, 2]`). A processor is given the wrapper as its tokenizer,
    because not every processor returns its text and the offsets.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.text = ""
        self.ids = torch.zeros(0, dtype=torch.long)
        self.offsets = torch.zeros(0, 2, dtype=torch.long)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        encoding = self.tokenizer(text, *args, **{**kwargs, "return_offsets_mapping": True})
        self.text = text if isinstance(text, str) else text[0]
        self.ids = torch.as_tensor(encoding["input_ids"]).reshape(-1)
        self.offsets = torch.as_tensor(encoding.pop("offset_mapping")).reshape(-1, 2)
        return encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)


__all__ = ["Stretch", "TokenizerRecorder", "align", "move"]
