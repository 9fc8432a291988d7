"""Scores candidates after a draft state: with the draft's own head, the target's, or rows of the target's for the
draft's own vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..draft.interface import Draft
from ..draft.plain_modules import TensorFunction, function_at, function_of
from ..errors import MSDPairingError
from ..observer import phase
from ..target.adapter import TargetAdapter


_HALF = (torch.float16, torch.bfloat16)

LARGEST_BLOCK = 512  # most tokens of a block of `_blocked_top_k`


class DraftHead:
    """
    Scores candidates after a draft state. The output of `generate` does not depend on the scores, as the target
    verifies with its full head.

    Args:
        draft (`Draft`): a draft with or without a `draft_vocab` and a head of its own.
        target (`TargetAdapter`): lends its head.

    Raises:
        MSDPairingError: when the draft's vocabulary has tokens that the target lacks.
    """

    def __init__(self, draft: Draft, target: TargetAdapter):
        self.target = target
        self.draft = draft
        self._device = draft.device
        own_head: Any = draft.own_head
        takes_rows = own_head is None and draft.draft_vocab is not None
        self._rows = draft.head_rows(target.head_module) if takes_rows else None
        self._tokens: torch.Tensor | None = None  # [V']: the token id of each row
        self._norm = None if draft.head_norm is None else function_of(draft.head_norm)
        self._is_capped = own_head is None and target.logit_cap is not None
        head = target.head_module if own_head is None else own_head
        plain_head = None if self._is_capped else function_at(head, draft)
        self._head = plain_head or (target.head if own_head is None else own_head)
        weight = head.weight
        if self._rows is not None:
            weight = self._rows[0]
        if draft.draft_vocab is not None and (self._rows is not None or own_head is not None):
            self._tokens = draft.draft_vocab.to(weight.device)
        if own_head is not None:
            self._check_tokens(weight)
        # On a CPU new memory takes time, so logits are overwritten if no other code can hold them.
        is_plain_head = plain_head not in (None, head)
        owns_logits = self._rows is not None or is_plain_head
        self._overwrites = owns_logits and weight.device.type == "cpu" and weight.dtype not in _HALF
        self._product: TensorFunction | None = None  # called in place of `logits`
        if self._rows is not None:
            is_product = self._rows[1] is None and not self._is_capped
        else:
            is_product = own_head is not None and is_plain_head and own_head.bias is None
        if is_product and self._overwrites and weight.device == self._device and weight.dtype == draft.dtype:
            self._product = _ProductInPlace(weight)
        self._is_on_device = weight.device == self._device

    def _check_tokens(self, weight: torch.Tensor) -> None:
        """Refuses a head of the draft that proposes tokens which the target lacks."""
        last = weight.shape[0] - 1 if self._tokens is None else int(self._tokens.max())
        num_tokens = getattr(self.target.text_config, "vocab_size", None)
        if num_tokens is not None and last >= num_tokens:
            raise MSDPairingError(
                f"The draft proposes tokens up to {last}, and the target's vocabulary has only {num_tokens} tokens. "
                "Use the draft that was made for this target."
            )

    def keep_address(self) -> None:
        """Prepares for compiled code, whose CUDA graphs read the head, or rows taken from it, at a fixed address."""
        self._head = self.target.head
        self._overwrites = False
        for part in self._rows or ():
            if part is not None:
                torch._dynamo.mark_static_address(part)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Scores `[B, F, V]` of all candidates after each state `[B, F, H]`, normed if the draft has a `head_norm`."""
        if self._rows is None:
            return self._head(states)
        weight, bias = self._rows
        return self.target.cap(functional.linear(states.to(weight), weight, bias))

    def top_k(self, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and tokens `[B, F, K]` of the best candidates after each state `[B, F, H]`."""
        with phase("draft head"):
            if self._norm is not None:
                states = self._norm(states)
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
