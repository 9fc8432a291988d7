"""The layers of an EAGLE-3 draft. The first one attends over embedding and hidden state side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from ...attention.unrolled import UnrolledPass
from ...compat import CACHE_NAME
from .configuration import Eagle3DraftConfig


class Eagle3Attention(LlamaAttention):
    """
    LLaMA attention with inputs of any width, and norms of queries and keys if the configuration asks for them.

    Args:
        config (`Eagle3DraftConfig`): the draft's configuration.
        layer_idx (`int`): number of the layer.
        width (`int`): width of the input.
    """

    def __init__(self, config: Eagle3DraftConfig, layer_idx: int, width: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        assert num_kv_heads is not None
        self.q_proj = nn.Linear(width, num_heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        unrolled: UnrolledPass | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attends over `hidden_states` `[B, T, width]` and the cache; returns `[B, T, H]`."""
        cache = kwargs.pop(CACHE_NAME, None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, keys = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        values = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries.transpose(1, 2), keys.transpose(1, 2), *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0
        if unrolled is not None:
            attended = unrolled.attend(self.layer_idx, queries, keys, values, self.scaling, dropout)
            return self.o_proj(attended.transpose(1, 2).flatten(2))
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(
            self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())


class Eagle3DecoderLayer(GradientCheckpointingLayer):
    """
    A layer of an EAGLE-3 draft.

    Args:
        config (`Eagle3DraftConfig`): the draft's configuration.
        layer_idx (`int`): number of the layer. Layer 0 reads embeddings besides hidden states.
    """

    def __init__(self, config: Eagle3DraftConfig, layer_idx: int):
        super().__init__()
        is_first = layer_idx == 0
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Eagle3Attention(config, layer_idx, 2 * size if is_first else size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(size, eps=eps)
        self.hidden_norm = LlamaRMSNorm(size, eps=eps) if is_first else None
        self.post_attention_layernorm = LlamaRMSNorm(size, eps=eps)

    def forward(
        self, residual: torch.Tensor, attention_input: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Runs the layer.

        Args:
            residual (`torch.Tensor` of shape `[B, T, H]`): what the attention's result is added to.
            attention_input (`torch.Tensor` of shape `[B, T, 2 * H]` in the first layer, `[B, T, H]` in others): the
                normed input of the attention.
            attention_mask (`torch.Tensor`, *optional*): additive mask.

        Returns:
            `torch.Tensor` of shape `[B, T, H]`.
        """
        states = residual + self.self_attn(attention_input, attention_mask=attention_mask, **kwargs)
        return states + self.mlp(self.post_attention_layernorm(states))


__all__ = ["Eagle3Attention", "Eagle3DecoderLayer"]
