"""A streamer that shows which tokens were drafted and accepted."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..decoding.verified_streamer import VerifiedStreamer
from ..web.pieces import Pieces


ACCEPTED_STYLE = "bold green"


class AcceptanceStreamer(VerifiedStreamer):
    """
    Prints text as it is generated. Accepted draft tokens are green, or stand between ‹ and › if the terminal has no
    colours.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens.
        console: prints the text.
    """

    def __init__(self, tokenizer: Any, console: Console):
        super().__init__()
        self.console = console
        self._coloured = console.is_terminal and not console.no_color
        self._pieces = Pieces(tokenizer)
        self._in_draft = False

    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        for index, token in enumerate(tokens.tolist()):
            self._print(self._pieces.add(token), accepted=index < num_draft_tokens)

    def end(self) -> None:
        if self._in_draft and not self._coloured:
            self.console.print("›", end="", markup=False, highlight=False)
        self.console.print()

    def _print(self, piece: str, accepted: bool) -> None:
        if not piece:
            return
        if self._coloured:
            self.console.print(Text(piece, style=ACCEPTED_STYLE if accepted else ""), end="", soft_wrap=True)
        else:
            if accepted != self._in_draft:
                piece = ("‹" if accepted else "›") + piece
            self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        self._in_draft = accepted


__all__ = ["AcceptanceStreamer"]
