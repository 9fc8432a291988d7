"""Sparse attention that chooses blocks of neighbouring slots, over candidate trees (MiniMax M3).

The model's indexer scores all keys for each query, takes the largest score of each block of slots, and keeps the
blocks with the largest ones. The slots of a tree are not in the order of a text, so a block is made of places in the
text here: a node stands at the place that it would have if its branch were the text. A block then holds what it holds
in token-by-token decoding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class NodePlaces:
    """
    The keys of a forward over trees: S slots of the context and N nodes.

    Args:
        places (`torch.LongTensor` of shape `[B, S + N]`): place of each key in the text of its row, padding counted.
        visible (`torch.BoolTensor` of shape `[B, N, S + N]`): the keys that each node sees, padding included.
        length (`int`): number of places, at least; known to the host, which need not wait for the device.
    """

    places: torch.Tensor
    visible: torch.Tensor
    length: int

    def blocks(self, block_size: int, device: torch.device) -> tuple[int, torch.Tensor]:
        """The number of blocks, and the block of each key, `[B, 1, 1, S + N]`."""
        return -(-self.length // block_size), (self.places.to(device) // block_size)[:, None, None]


def indexers_of(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that choose blocks of slots."""
    return [module for module in decoder.modules() if hasattr(module, "build_block_mask")]


def choose_blocks(
    indexer: Any,
    nodes: NodePlaces,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: Any,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """
    The forward of an indexer over the nodes of trees. Arguments behind `nodes` are those of its own forward.

    Returns:
        `torch.LongTensor` of shape `[B, heads, N, blocks]`: the chosen blocks of each node; -1 behind them.
    """
    batch_size, num_nodes = hidden_states.shape[:2]
    queries, keys = (
        norm(projection(hidden_states).view(batch_size, num_nodes, -1, indexer.head_dim)).transpose(1, 2)
        for norm, projection in ((indexer.q_norm, indexer.q_proj), (indexer.k_norm, indexer.k_proj))
    )
    rotate = sys.modules[type(indexer).__module__].apply_rotary_pos_emb
    queries, keys = rotate(queries, keys, *(part[..., : indexer.head_dim] for part in position_embeddings))
    keys = cache.layers[indexer.layer_idx].update_index(keys)
    scores = queries.float() @ keys.float().mT  # [B, heads, N, S + N]
    places = nodes.places.to(scores.device)
    # As the model does, which compares slots with positions although padding makes them differ.
    is_seen = nodes.visible.to(scores.device) & (places.unsqueeze(1) <= position_ids.unsqueeze(2))
    scores = scores.masked_fill(~is_seen.unsqueeze(1), -torch.inf)
    num_blocks, blocks = nodes.blocks(indexer.block_size, scores.device)
    best = scores.new_full((*scores.shape[:3], num_blocks), -torch.inf)
    best = best.scatter_reduce(3, blocks.expand_as(scores), scores, "amax")
    if indexer.local_blocks > 0:
        steps = torch.arange(indexer.local_blocks, device=scores.device)
        local = ((position_ids // indexer.block_size).unsqueeze(2) - steps).clamp(min=0)
        best = best.scatter(3, local.unsqueeze(1).expand(-1, scores.shape[1], -1, -1), torch.inf)
    values, chosen = best.topk(min(indexer.topk_blocks, num_blocks), dim=-1)
    return chosen.masked_fill(values == -torch.inf, -1)


def mask_of_blocks(
    indexer: Any, nodes: NodePlaces, chosen: torch.Tensor, tree_mask: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """
    The additive mask of nodes that see the chosen blocks alone.

    Args:
        chosen: what `choose_blocks` has returned.
        tree_mask (`torch.Tensor` of shape `[B, 1, N, S + N]`): the additive mask of the trees.
        dtype (`torch.dtype`): dtype of the mask.

    Returns:
        `torch.Tensor` of shape `[B, attention heads, N, S + N]`.
    """
    num_blocks, blocks = nodes.blocks(indexer.block_size, chosen.device)
    is_chosen = chosen.new_zeros(*chosen.shape[:3], num_blocks + 1, dtype=torch.bool)
    is_chosen = is_chosen.scatter(3, chosen.masked_fill(chosen < 0, num_blocks), True)
    keeps = is_chosen.gather(3, blocks.expand(*chosen.shape[:3], -1)) & (tree_mask == 0)
    keeps = keeps.repeat_interleave(indexer.config.num_attention_heads // chosen.shape[1], dim=1)
    return torch.zeros(keeps.shape, dtype=dtype, device=keeps.device).masked_fill(~keeps, torch.finfo(dtype).min)


__all__ = ["NodePlaces", "choose_blocks", "indexers_of", "mask_of_blocks"]
