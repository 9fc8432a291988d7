"""The base of streamers that get the tokens of a verification at once, and how many of them were drafted."""

from __future__ import annotations

from abc import abstractmethod

import torch
from transformers.generation.streamers import BaseStreamer


class VerifiedStreamer(BaseStreamer):
    """Hands each verification of one sequence to `put_verified`, and each token of `generate` without a draft."""

    def __init__(self) -> None:
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, which is passed over, and tokens of `generate` without a draft."""
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.put_verified(value.reshape(-1), 0)

    @abstractmethod
    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        """Receives the tokens `[N]` of one verification. The first `num_draft_tokens` of them were drafted."""

    def end(self) -> None: ...


__all__ = ["VerifiedStreamer"]
