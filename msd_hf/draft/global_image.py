"""One vector of all images so far, which a draft adds to the input of the text rows behind them (arXiv 2509.15235)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


_MOST_SCORE = 10.0  # keeps sums of exponentials within the range of float32


class GlobalImage(nn.Module):
    """
    Pools the visual rows before each row by learned attention, and projects the result.

    The score of a row depends on its embedding alone, so the vectors of all rows follow from two running sums. The
    vector of a row depends on no later row.

    Args:
        hidden_size (`int`): width of the draft.
        eps (`float`): of the norm, which the embeddings pass because those of images have norms of all sizes.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The vector of each row, zero before the first visual row.

        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, T, H]`): embeddings of the rows.
            visual_mask (`torch.BoolTensor` of shape `[B, T]`): the visual rows.
            earlier (`torch.Tensor` of shape `[B, E, H]`, *optional*): embeddings of the visual rows before these.

        Returns:
            `torch.Tensor` of shape `[B, T, H]`.
        """
        weights, weighted = self._parts(inputs_embeds, visual_mask)
        totals, sums = weights.cumsum(1), weighted.cumsum(1)
        if earlier is not None:
            weights, weighted = self._parts(earlier, torch.ones_like(earlier[..., 0], dtype=torch.bool))
            totals, sums = totals + weights.sum(1, keepdim=True), sums + weighted.sum(1, keepdim=True)
        # Without a visual row both sums are 0.
        pooled = sums / totals.clamp(min=torch.finfo(totals.dtype).tiny)
        return self.proj(pooled.to(inputs_embeds.dtype))

    def _parts(self, embeds: torch.Tensor, visual_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights `[B, T, 1]`, and normed embeddings times their weights `[B, T, H]`; zero at other rows."""
        mask = visual_mask.unsqueeze(-1)
        dtype = torch.float64 if embeds.dtype == torch.float64 else torch.float32
        normed = functional.rms_norm(embeds.masked_fill(~mask, 0).to(dtype), embeds.shape[-1:], eps=self.eps)
        scores = self.score(normed.to(embeds.dtype)).to(dtype)
        weights = (_MOST_SCORE * torch.tanh(scores / _MOST_SCORE)).exp().masked_fill(~mask, 0)
        return weights, weights * normed


__all__ = ["GlobalImage"]
