"""The draft's forward over a few nodes of a tree, as it runs many times a round."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import Cache

from .modeling_msd import MSDDraftDecoderLayer, MSDDraftModel


# Of these the tables of sines depend on the length of the sequence.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_MIN_POSITIONS = 1024


class DraftingStep:
    """
    Gives what `MSDDraftModel.forward` gives with an additive mask, or with none for one node. It leaves out what a
    forward of any length, with any attention, in training or not, has to look after: for a small model that is most of
    the time. Weights, projections (also wrapped or quantised ones) and cache are the draft's own.

    Args:
        draft (`MSDDraftModel`): the draft. One that is not plain (not with sdpa, say) runs as it is.
    """

    def __init__(self, draft: MSDDraftModel):
        self.draft = draft
        self.is_plain = (
            draft.config._attn_implementation == "sdpa"
            and draft.rotary_emb.rope_type not in _LENGTH_DEPENDENT_ROPE
            and all(type(layer) is MSDDraftDecoderLayer for layer in draft.layers)
            # With hooks of accelerate, weights are elsewhere.
            and not any(hasattr(module, "_hf_hook") for module in draft.modules())
        )
        self._rotations = torch.empty(0)  # cosines and sines of each position, [P, 2, head_dim]

    @torch.no_grad()
    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache,
        last_position: int,
    ) -> torch.Tensor:
        """
        Args:
            inputs_embeds, hidden_states, position_ids, attention_mask, cache: as in `MSDDraftModel.forward`.
            last_position (`int`): a bound of `position_ids`, known without reading them back.

        Returns:
            The last hidden states, `[B, T, H]`.
        """
        if not self.is_plain:
            return self.draft(
                inputs_embeds=inputs_embeds,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
            ).last_hidden_state
        if last_position >= len(self._rotations):
            self._make_tables(2 * last_position, inputs_embeds)
        cos, sin = self._rotations[position_ids.unsqueeze(1)].unbind(3)
        return draft_forward(self.draft, inputs_embeds, hidden_states, cos, sin, attention_mask, cache)

    def _make_tables(self, num_positions: int, like: torch.Tensor) -> None:
        positions = torch.arange(max(num_positions, _MIN_POSITIONS), device=like.device)
        cos, sin = self.draft.rotary_emb(like, positions.unsqueeze(0))
        self._rotations = torch.stack([cos[0], sin[0]], dim=1)


def draft_forward(
    draft: MSDDraftModel,
    inputs_embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    """The draft's last hidden states `[B, T, H]`; cosines and sines are `[B, 1, T, head_dim]`."""
    states = draft.fuse(inputs_embeds, hidden_states)
    for layer in draft.layers:
        states = _layer(layer, states, cos, sin, attention_mask, cache)
    return states


def _layer(
    layer: Any,  # `MSDDraftDecoderLayer`
    states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    batch_size, length, _ = states.shape
    heads_shape = (batch_size, length, -1, attention.head_dim)
    normed = layer.input_layernorm(states)
    queries = attention.q_proj(normed).view(heads_shape)
    keys = attention.k_proj(normed).view(heads_shape)
    values = attention.v_proj(normed).view(heads_shape).transpose(1, 2)
    num_heads, num_kv_heads = queries.shape[2], keys.shape[2]
    both = torch.cat([queries, keys], dim=2).transpose(1, 2)  # turned together
    first, second = both.chunk(2, dim=-1)
    both = torch.addcmul(both * cos, torch.cat([-second, first], dim=-1), sin)
    queries, keys = both.split([num_heads, num_kv_heads], dim=1)
    keys, values = cache.update(keys, values, attention.layer_idx)
    if num_kv_heads < num_heads:
        # The queries of a group stand behind each other, so that keys need not be repeated for them.
        groups = num_heads // num_kv_heads
        queries = queries.reshape(batch_size, num_kv_heads, groups * length, -1)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    attended = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=attention_mask, scale=attention.scaling
    )
    attended = attended.reshape(batch_size, num_heads, length, -1).transpose(1, 2).reshape(batch_size, length, -1)
    states = states + attention.o_proj(attended)
    norm = layer.post_attention_layernorm
    normed = functional.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return states + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))


__all__ = ["DraftingStep", "draft_forward"]
