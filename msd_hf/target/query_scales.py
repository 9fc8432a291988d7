"""Layers that scale their queries by the place of a token, which they count from the length of the cache.

Llama 4 does so in its layers without rotary embeddings: every `floor_scale` tokens the scale grows. A forward counts
its tokens one after another behind all slots of the cache. Nodes of a tree stand beside each other, and a row of a
batch may use fewer slots. Where that makes a difference, the output of the query projections is corrected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kv.slots import ContextSlots
from ..tree.candidate import CandidateTree


class QueryScales:
    """
    The scales of a decoder's queries.

    Args:
        decoder (`nn.Module`): the decoder.

    Attributes:
        projections (`list[nn.Module]`): the query projections of the layers that scale their queries by place.
    """

    def __init__(self, decoder: nn.Module):
        layers: list[Any] = []
        if getattr(decoder.config, "attn_temperature_tuning", False):
            layers = [module for module in decoder.modules() if _scales_by_place(module)]
        self.projections: list[nn.Module] = [layer.q_proj for layer in layers]
        if layers:
            self._floor_scale, self._attn_scale = layers[0].floor_scale, layers[0].attn_scale

    def corrections(self, tree: CandidateTree, context: ContextSlots) -> torch.Tensor | None:
        """
        The factors by which queries of the nodes must be multiplied.

        Args:
            tree (`CandidateTree`): trees of N nodes.
            context (`ContextSlots`): the slots before the nodes.

        Returns:
            `torch.Tensor` of shape `[B, N, 1]`; `None` if all factors are 1.
        """
        num_nodes, start = tree.tokens.shape[1], context.num_slots
        # On the host, because most trees need no correction: the scale is the same for all of their places.
        if not self.projections or self._step(min(context.lengths)) == self._step(start + num_nodes - 1):
            return None
        device = tree.depths.device
        places = context.row_lengths(device).unsqueeze(1) + tree.depths
        counted = start + torch.arange(num_nodes, device=device)
        return (self._scale(places) / self._scale(counted)).unsqueeze(2)

    def _step(self, place: int) -> int:
        return (place + 1) // self._floor_scale

    def _scale(self, places: torch.Tensor) -> torch.Tensor:
        # In float32, as the layers compute it; the quotient of two scales is exact enough in float64.
        steps = torch.floor((places.float() + 1.0) / self._floor_scale)
        return (torch.log1p(steps) * self._attn_scale + 1.0).double()


def _scales_by_place(module: nn.Module) -> bool:
    return bool(vars(module).get("attn_temperature_tuning")) and not vars(module).get("use_rope")


__all__ = ["QueryScales"]
