"""What a processor does to a text before it is tokenized: images become many tokens, and all behind them moves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import MSDError


@dataclass(frozen=True)
class Stretch:
    """
    Text that expansion leaves as it is.

    Args:
        rendered (`int`): its first character in the rendered text.
        expanded (`int`): its first character in the expanded text.
        length (`int`): characters.
    """

    rendered: int
    expanded: int
    length: int


def align(rendered: str, expanded: str, image_tokens: Sequence[str]) -> list[Stretch]:
    """
    The stretches of text before, between and behind the images. In the expanded text the images are what lies between
    two stretches.

    Args:
        rendered (`str`): what the chat template wrote.
        expanded (`str`): what the tokenizer was given.
        image_tokens (`Sequence[str]`): tokens in `rendered` that may be expanded.

    Raises:
        MSDError: when anything else was changed.
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
            raise MSDError(f"The processor changes the text of a chat around its images: {piece[:80]!r} is not kept.")
        stretches.append(Stretch(begin, found, len(piece)))
        place = found + len(piece)
    return stretches


def move(span: tuple[int, int], stretches: list[Stretch]) -> tuple[int, int]:
    """A span of the rendered text, free of images, in the expanded text."""
    begin, end = span
    for stretch in stretches:
        shift = stretch.expanded - stretch.rendered
        if stretch.rendered <= begin and end <= stretch.rendered + stretch.length:
            return begin + shift, end + shift
    raise MSDError(f"Characters {begin} to {end} of the chat hold an image.")


class TokenizerRecorder:
    """
    A tokenizer that keeps the one text it was given (`text`), its tokens (`ids`, long, `[L]`) and the characters of
    each (`offsets`, long, `[L, 2]`). A processor that has it as its tokenizer need not hand these out, and not every
    one does.
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
