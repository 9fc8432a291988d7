"""The draft's forward over a few nodes of a tree, as it runs many times a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..attention.split import grouped_sdpa
from ..draft.modeling_msd import MSDDraftDecoderLayer, MSDDraftModel
from ..target.support import LENGTH_DEPENDENT_ROPE
from .plain_modules import TensorFunction, function_of


# Gives what is attended `[B, H, T, D]`, of queries, keys and values (perhaps of fewer heads), an additive mask and the
# scale of scores.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]

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
            and draft.rotary_emb.rope_type not in LENGTH_DEPENDENT_ROPE  # tables of sines
            and all(type(layer) is MSDDraftDecoderLayer for layer in draft.layers)
            # With hooks of accelerate, weights are elsewhere.
            and not any(hasattr(module, "_hf_hook") for module in draft.modules())
        )
        self._parts = DraftParts.without_modules(draft) if self.is_plain else None
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
            inputs_embeds, hidden_states, attention_mask, cache: as in `MSDDraftModel.forward`.
            position_ids (`torch.LongTensor` of shape `[B, T]`, or `[B, 1]` if all of a row's are the same).
            last_position (`int`): a bound of `position_ids`, known without reading them back.

        Returns:
            The last hidden states, `[B, T, H]`.
        """
        if self._parts is None:
            return self.draft(
                inputs_embeds=inputs_embeds,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids.expand(hidden_states.shape[:2]),
                past_key_values=cache,
            ).last_hidden_state
        if last_position >= len(self._rotations):
            self._make_tables(2 * last_position, inputs_embeds)
        cos, sin = self._rotations[position_ids.unsqueeze(1)].unbind(3)
        return draft_forward(self._parts, inputs_embeds, hidden_states, cos, sin, attention_mask, cache)

    def _make_tables(self, num_positions: int, like: torch.Tensor) -> None:
        positions = torch.arange(max(num_positions, _MIN_POSITIONS), device=like.device)
        cos, sin = self.draft.rotary_emb(like, positions.unsqueeze(0))
        self._rotations = torch.stack([cos[0], sin[0]], dim=1)


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer of the draft is made of, each a function of states `[..., H]`."""

    input_norm: TensorFunction
    query: TensorFunction
    key: TensorFunction
    value: TensorFunction
    output: TensorFunction
    post_attention_norm: TensorFunction
    gate: TensorFunction
    activation: TensorFunction
    up: TensorFunction
    down: TensorFunction
    head_dim: int
    scaling: float


@dataclass(frozen=True)
class DraftParts:
    """What a draft is made of."""

    fuse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # see `MSDDraftModel.fuse`
    layers: list[LayerParts]

    @classmethod
    def modules(
        cls, draft: MSDDraftModel, taken: Callable[[nn.Module], TensorFunction] = lambda module: module
    ) -> DraftParts:
        """The draft's own modules, or what is `taken` for each."""
        layers: Any = draft.layers
        return cls(draft.fuse, [_layer_parts(layer, taken) for layer in layers])

    @classmethod
    def without_modules(cls, draft: MSDDraftModel) -> DraftParts:
        """The same with functions in place of plain modules."""
        parts = cls.modules(draft, function_of)
        if draft.feature_proj is not None or type(draft).fuse is not MSDDraftModel.fuse:
            return parts
        fc = function_of(draft.fc)
        return replace(parts, fuse=lambda embeds, states: fc(torch.cat([embeds, states], dim=-1)))


def _layer_parts(layer: Any, taken: Callable[[nn.Module], TensorFunction]) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        input_norm=taken(layer.input_layernorm),
        query=taken(attention.q_proj),
        key=taken(attention.k_proj),
        value=taken(attention.v_proj),
        output=taken(attention.o_proj),
        post_attention_norm=taken(layer.post_attention_layernorm),
        gate=taken(mlp.gate_proj),
        activation=taken(mlp.act_fn),
        up=taken(mlp.up_proj),
        down=taken(mlp.down_proj),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
    )


def draft_forward(
    parts: DraftParts,
    inputs_embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
    attend: Attention = grouped_sdpa,
) -> torch.Tensor:
    """The draft's last hidden states `[B, T, H]`. Cosines and sines are `[B, 1, T, head_dim]`, with T = 1 if all
    positions of a row are the same."""
    batch_size, length, _ = inputs_embeds.shape
    # Rows of a matrix: each projection would make them one otherwise.
    states = parts.fuse(inputs_embeds.flatten(0, 1), hidden_states.flatten(0, 1))
    for number, layer in enumerate(parts.layers):
        states = _layer(layer, number, states, (batch_size, length), cos, sin, attention_mask, cache, attend)
    return states.view(batch_size, length, -1)


def _layer(
    layer: LayerParts,
    number: int,
    states: torch.Tensor,
    shape: tuple[int, int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
    attend: Attention,
) -> torch.Tensor:
    batch_size, length = shape
    heads_shape = (batch_size, length, -1, layer.head_dim)
    normed = layer.input_norm(states)
    queries = layer.query(normed).view(heads_shape)
    keys = layer.key(normed).view(heads_shape)
    values = layer.value(normed).view(heads_shape).transpose(1, 2)
    num_heads, num_kv_heads = queries.shape[2], keys.shape[2]
    both = torch.cat([queries, keys], dim=2).transpose(1, 2)  # turned together
    first, second = both.chunk(2, dim=-1)
    both = torch.addcmul(both * cos, torch.cat([-second, first], dim=-1), sin)
    queries, keys = both.split([num_heads, num_kv_heads], dim=1)
    keys, values = cache.update(keys, values, number)
    attended = attend(queries, keys, values, attention_mask, layer.scaling)
    attended = attended.transpose(1, 2).reshape(batch_size * length, -1)
    states = states + layer.output(attended)
    normed = layer.post_attention_norm(states)
    return states + layer.down(layer.activation(layer.gate(normed)) * layer.up(normed))


__all__ = ["DraftParts", "DraftingStep", "draft_forward"]
