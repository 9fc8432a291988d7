"""Makes a few vectors of the many patch embeddings of an image, by attention of learned queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .configuration import ViSpecDraftConfig


class ImageAdaptor(nn.Module):
    """Attention of `num_queries` learned queries over the patches of one image, without positions."""

    def __init__(self, config: ViSpecDraftConfig):
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        width: Any = config.head_dim
        self.q = nn.Parameter(torch.empty(config.num_queries, heads, width))
        self.k_proj = nn.Linear(size, heads * width, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, heads * width, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * width, size, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Makes vectors `[num_queries, H]` of the patches of an image `[P, H]`."""
        shape = (len(patches), *self.q.shape[1:])
        keys, values = (part(patches).view(shape).transpose(0, 1) for part in (self.k_proj, self.v_proj))
        attended = functional.scaled_dot_product_attention(self.q.transpose(0, 1), keys, values)  # [heads, N, D]
        return self.o_proj(attended.transpose(0, 1).flatten(1))


def runs_of(visual_mask: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """The runs of visual rows in `[B, L]`, each an image: row of the batch, first row, and the row behind the last."""
    for number, row in enumerate(visual_mask.tolist()):
        start = None
        for place, is_visual in enumerate([*row, False]):
            if is_visual and start is None:
                start = place
            elif not is_visual and start is not None:
                yield number, start, place
                start = None


__all__ = ["ImageAdaptor", "runs_of"]
