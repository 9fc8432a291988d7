"""The candidates after a draft state: the target's head, or of its rows those of the draft's own vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional

from .modeling_msd import MSDDraftModel
from .phases import phase
from .plain_modules import function_at
from .targets import TargetAdapter


class DraftHead:
    """
    Scores candidates. The output of `generate` does not depend on it: the target verifies with its full head.

    Args:
        draft (`MSDDraftModel`): with a `draft_vocab`, or without.
        target (`TargetAdapter`): lends its head.
    """

    def __init__(self, draft: MSDDraftModel, target: TargetAdapter):
        self.target = target
        self.draft = draft
        self._device = draft.device
        self._tokens = draft.draft_vocab
        self._rows = None if self._tokens is None else draft.head_rows(target.head_module)
        at_hand = function_at(target.head_module, draft) if target.logit_cap is None else None
        self._head = at_hand or target.head

    def keep_address(self) -> None:
        """Lets CUDA graphs read the head's weights, or the rows of the draft's own vocabulary, where they are."""
        self._head = self.target.head
        for part in self._rows or ():
            if part is not None:
                torch._dynamo.mark_static_address(part)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Scores of all candidates after each of `states` `[B, F, H]`."""
        if self._rows is None:
            return self._head(states)
        weight, bias = self._rows
        return self.target.cap(functional.linear(states.to(weight), weight, bias))

    def top_k(self, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and tokens `[B, F, K]` of the best candidates after each of `states` `[B, F, H]`."""
        with phase("draft head"):
            logits = self.logits(states)
        return self.best(logits, top_k)

    def best(self, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, of what `logits` gave."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        log_probs, tokens = logits.log_softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1)
        if self._rows is not None:
            assert self._tokens is not None
            tokens = self._tokens.take(tokens.to(self._tokens.device))
        if log_probs.device == self._device:
            return log_probs, tokens
        return log_probs.to(self._device), tokens.to(self._device)


__all__ = ["DraftHead"]
