"""The terms of the loss on tokens for a draft with a head of its own, whose weights are trained with it.

The draft may have rows for a part of the target's vocabulary only. As in EAGLE-3 it then learns the target's
probabilities among its own tokens, at the rows where the target's most likely token is one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class OwnHead:
    """
    A draft's own head.

    Args:
        score: outputs of the draft `[R, H]` to logits `[R, V']`, with gradients for its weights.
        tokens (`torch.LongTensor` of shape `[V']`, *optional*): the target's id of each row; `None`: its first rows.
    """

    score: Callable[[torch.Tensor], torch.Tensor]
    tokens: torch.Tensor | None = None

    def terms(
        self,
        states: torch.Tensor,
        goals: torch.Tensor,
        target_head: Callable[[torch.Tensor], torch.Tensor],
        labels_of: Callable[[torch.Tensor], torch.Tensor],
        functions: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], bool]],
        num_ranks: int,
        chunk_size: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Computes terms for R rows. At most `chunk_size` rows of logits exist at a time: the backward pass computes them
        again.

        Args:
            states (`[R, H]`), goals (`[R, H_target]`): the draft's outputs and the target's hidden states.
            target_head: the target's head, `[r, H_target] -> [r, V]`.
            labels_of: the target's probabilities `[r, V]`, from its logits.
            functions: by name, a function of the draft's logits and probabilities of the target, `[r, V']` each, to
                values `[r]`; and whether it compares with probabilities among the draft's tokens (or among all).
            num_ranks: number of the draft's most likely tokens that are compared with the target's.

        Returns:
            Whether the target's most likely token is among the draft's 1, 2, ... most likely ones, `[R, num_ranks]`,
            and the values `[R]` by name.
        """

        def of_chunk(states: torch.Tensor, goals: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self.score(states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            with torch.no_grad():
                target_logits = target_head(goals).to(logits)
                size = logits.shape[-1]
                tokens = torch.arange(size, device=logits.device) if self.tokens is None else self.tokens
                likely = target_logits.argmax(-1, keepdim=True)  # [r, 1]
                shares = labels_of(target_logits)[:, tokens]
                has_likely = torch.isin(likely, tokens).to(shares)
                among = has_likely * shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
                best = tokens[logits.topk(min(num_ranks, size), dim=-1).indices]
                hits = torch.nn.functional.pad((best == likely).cumsum(-1), (0, num_ranks - best.shape[1])).bool()
            values = [function(logits, among if is_among else shares) for function, is_among in functions.values()]
            return hits, *values

        parts = [
            checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(states.split(chunk_size), goals.split(chunk_size), strict=True)
        ]
        hits, *values = (torch.cat(column) for column in zip(*parts, strict=True))
        return hits, dict(zip(functions, values, strict=True))


__all__ = ["OwnHead"]
