"""The last decoder layer over a prompt, of which only the last row's output is needed.

All rows need keys and values, for the rows that come. Queries, attention and MLP of all rows but the last would be
computed for nothing: most of the pass over a prompt, and all of its cost that grows with the square of the length.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.models.llama.modeling_llama import rotate_half

from ..attention.split import grouped_sdpa


def last_row_of_layer(
    layer: Any,
    residual: torch.Tensor,
    normed: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: Cache | None,
) -> torch.Tensor:
    """
    The output of a decoder layer of the LLaMA kind at the last row, `[B, 1, H]`. The cache is extended by all rows.

    Args:
        layer: the layer.
        residual (`torch.Tensor` of shape `[B, 1, H]`): what the attention's result is added to.
        normed (`torch.Tensor` of shape `[B, T, W]`): the normed input of the attention.
        attention_mask (`torch.Tensor`, *optional*): `[B, S + T]` with 1 for slots that may be seen, or an additive or
            boolean mask `[B, 1, T, S + T]`. Without one, the last row sees everything.
        position_embeddings: cosines and sines `[B, T, head_dim]`.
        cache (`Cache`, *optional*): keys and values of S earlier rows.
    """
    attention = layer.self_attn
    batch_size, length, _ = normed.shape
    shape = (batch_size, length, -1, attention.head_dim)
    keys, values = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape).transpose(1, 2)
    queries = attention.q_proj(normed[:, -1:]).view(batch_size, 1, -1, attention.head_dim)
    if getattr(attention, "q_norm", None) is not None:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
    cos, sin = (part.unsqueeze(1) for part in position_embeddings)
    keys = keys * cos + rotate_half(keys) * sin
    queries = queries * cos[:, :, -1:] + rotate_half(queries) * sin[:, :, -1:]
    if cache is not None:
        length += cache.get_seq_length(attention.layer_idx)
        keys, values = cache.update(keys, values, attention.layer_idx)
        keys, values = keys[:, :, :length], values[:, :, :length]  # a cache of a fixed size has more slots
    mask = attention_mask
    if mask is not None:
        mask = mask[:, None, None, :length].bool() if mask.dim() == 2 else mask[:, :, -1:, :length]
    attended = grouped_sdpa(queries, keys, values, mask, attention.scaling)
    last = residual + attention.o_proj(attended.transpose(1, 2).flatten(2))
    return last + layer.mlp(layer.post_attention_layernorm(last))


__all__ = ["last_row_of_layer"]
