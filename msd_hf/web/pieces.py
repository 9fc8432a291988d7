"""The text of an answer, token by token."""

from __future__ import annotations

from typing import Any


class Pieces:
    """
    Decodes an answer token by token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._text = ""

    def add(self, token: int) -> str:
        """The text that one more token adds; empty if more bytes of its character follow."""
        # The whole answer is decoded, because a tokenizer may write a token otherwise at the start of a text.
        self._tokens.append(token)
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("�"):
            return ""
        piece = text[len(self._text) :]
        self._text = text
        return piece


__all__ = ["Pieces"]
