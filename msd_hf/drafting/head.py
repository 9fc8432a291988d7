"""Scores candidates after a draft state, with the target's head or its rows for the draft's own vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..draft.interface import Draft
from ..draft.plain_modules import TensorFunction, function_at
from ..observer import phase
from ..target.adapter import TargetAdapter


_HALF = (torch.float16, torch.bfloat16)

LARGEST_BLOCK = 512  # most tokens of a block of `_blocked_top_k`


class DraftHead:
    """
    Scores candidates after a draft state. The output of `generate` does not depend on the scores, as the target
    verifies with its full head.

    Args:
        draft (`Draft`): a draft with or without a `draft_vocab`.
        target (`TargetAdapter`): lends its head.
    """

    def __init__(self, draft: Draft, target: TargetAdapter):
        self.target = target
        self.draft = draft
        self._device = draft.device
        self._rows = None if draft.draft_vocab is None else draft.head_rows(target.head_module)
        self._tokens: torch.Tensor | None = None  # [V']: the token id of each row
        plain_head = function_at(target.head_module, draft) if target.logit_cap is None else None
        self._head = plain_head or target.head
        weight = target.head_module.weight
        if self._rows is not None:
            assert draft.draft_vocab is not None
            weight = self._rows[0]
            self._tokens = draft.draft_vocab.to(weight.device)
        # On a CPU new memory takes time, so logits are overwritten if no other code can hold them.
        owns_logits = self._rows is not None or plain_head not in (None, target.head_module)
        self._overwrites = owns_logits and weight.device.type == "cpu" and weight.dtype not in _HALF
        self._product: TensorFunction | None = None  # called in place of `logits`
        is_plain = self._rows is not None and self._rows[1] is None and target.logit_cap is None
        if is_plain and self._overwrites and weight.device == self._device and weight.dtype == draft.dtype:
            self._product = _ProductInPlace(weight)
        self._is_on_device = weight.device == self._device

    def keep_address(self) -> None:
        """Prepares for compiled code, whose CUDA graphs read the head, or rows taken from it, at a fixed address."""
        self._head = self.target.head
        self._overwrites = False
        for part in self._rows or ():
            if part is not None:
                torch._dynamo.mark_static_address(part)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Scores `[B, F, V]` of all candidates after each state `[B, F, H]`."""
        if self._rows is None:
            return self._head(states)
        weight, bias = self._rows
        return self.target.cap(functional.linear(states.to(weight), weight, bias))

    def top_k(self, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and tokens `[B, F, K]` of the best candidates after each state `[B, F, H]`."""
        with phase("draft head"):
            logits = self.logits(states) if self._product is None else self._product(states)
        if self._overwrites:
            log_probs = torch.log_softmax(logits, -1, out=logits)
        else:
            if logits.dtype in _HALF:
                logits = logits.float()
            log_probs = logits.log_softmax(-1)
        log_probs, tokens = log_probs.topk(min(top_k, log_probs.shape[2]))
        if self._tokens is not None:
            tokens = self._tokens.take(tokens)
        if self._is_on_device:
            return log_probs, tokens
        return log_probs.to(self._device), tokens.to(self._device)

    def compiled_top_k(self, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the result of `top_k` in a form for compiled code. Head and draft must be on one device."""
        logits = self.logits(states)
        if logits.dtype in _HALF:
            logits = logits.float()
        best, tokens = _blocked_top_k(logits, min(top_k, logits.shape[-1]))
        if self._tokens is not None:
            tokens = self._tokens.take(tokens)
        return best - logits.logsumexp(-1, keepdim=True), tokens


class _ProductInPlace:
    """Computes `functional.linear`, and writes the results to the same memory each time."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.t()
        self.room = weight.new_empty(0, weight.shape[0])

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        batch_size, width, hidden_size = states.shape
        num_rows = batch_size * width
        if num_rows > self.room.shape[0]:
            with torch.inference_mode(False):  # so that later calls outside of inference mode can write to it
                self.room = self.room.new_empty(num_rows, self.room.shape[1])
        room = self.room.narrow(0, 0, num_rows)
        return torch.mm(states.reshape(num_rows, hidden_size), self.weight, out=room).view(batch_size, width, -1)


def _blocked_top_k(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` of scores `[B, F, V]`, which searches only the blocks with the best maxima. On a GPU, `topk` of a whole
    vocabulary takes twenty kernels, and as long as the projections of a layer."""
    vocab_size = scores.shape[-1]
    size, fewest = 1, vocab_size + top_k
    for divisor in range(1, LARGEST_BLOCK + 1):
        num_searched = vocab_size // divisor + top_k * divisor  # by both `topk` below
        if vocab_size % divisor == 0 and num_searched < fewest:
            size, fewest = divisor, num_searched
    if min(size, vocab_size // size) <= 2 * top_k:
        return scores.topk(top_k, dim=-1)
    blocks = scores.unflatten(-1, (-1, size))
    chosen = blocks.amax(-1).topk(top_k, dim=-1).indices  # [B, F, K]
    candidates = blocks.gather(2, chosen.unsqueeze(3).expand(-1, -1, -1, size)).flatten(2)
    best, places = candidates.topk(top_k, dim=-1)
    return best, chosen.gather(2, places // size) * size + places % size


__all__ = ["DraftHead"]
