"""A draft's forward over a few nodes of a tree, without the checks of a general forward.

For a small draft these checks take most of the time. Weights, projections (also wrapped or quantised ones) and cache
are the draft's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..attention.split import grouped_sdpa
from .plain_modules import TensorFunction


# (queries [B, H, T, D], keys and values [B, Hk, S, D], additive mask, scale of the scores) -> attended [B, H, T, D].
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
# Embeddings [..., E] and hidden states [..., H] to the input of the first layer [..., H], or to a pair: what is added
# to the result of its attention [..., H], and the input of its attention.
Fuse = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class PlainLayer:
    """The parts of a decoder layer of the LLaMA kind, each a function of states `[..., H]`."""

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
    query_norm: TensorFunction | None = None  # over the last dimension of [B, T, heads, head_dim], as in Qwen3
    key_norm: TensorFunction | None = None

    @classmethod
    def of(cls, layer: Any, convert: Callable[[nn.Module], TensorFunction]) -> PlainLayer:
        """Takes the parts out of a decoder layer, with `convert(module)` in place of each module."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            input_norm=convert(layer.input_layernorm),
            query=convert(attention.q_proj),
            key=convert(attention.k_proj),
            value=convert(attention.v_proj),
            output=convert(attention.o_proj),
            post_attention_norm=convert(layer.post_attention_layernorm),
            gate=convert(mlp.gate_proj),
            activation=convert(mlp.act_fn),
            up=convert(mlp.up_proj),
            down=convert(mlp.down_proj),
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            **{
                name: convert(norm)
                for name, norm in (
                    ("query_norm", getattr(attention, "q_norm", None)),
                    ("key_norm", getattr(attention, "k_norm", None)),
                )
                if norm is not None
            },
        )


@dataclass(frozen=True)
class PlainForward:
    """
    A draft's forward over a few nodes of a tree: `fuse`, then the layers.

    Args:
        fuse (`Fuse`): embeddings and hidden states to the input of the first layer.
        layers (`Sequence[PlainLayer]`): the layers.
        norm (`TensorFunction`, *optional*): applied to the output of the last layer.
    """

    fuse: Fuse
    layers: Sequence[PlainLayer]
    norm: TensorFunction | None = None

    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache,
        attend: Attention = grouped_sdpa,
        image_vector: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Runs T nodes of each row through the layers.

        Args:
            inputs_embeds, hidden_states (`torch.Tensor` of shape `[B, T, H]`): embeddings and hidden states of the
                nodes.
            cos, sin (`torch.Tensor` of shape `[B, 1, T, head_dim]`): rotations for the positions of the nodes; T is 1
                if all positions of a row are the same.
            attention_mask (`torch.Tensor` of shape `[B, 1, T, S]`, *optional*): additive mask.
            cache (`Cache`): the draft's cache, which is extended by the nodes.
            attend (`Callable`): computes attention.
            image_vector (`torch.Tensor` of shape `[B, 1, H]`, *optional*): added to the input of the first layer.

        Returns:
            The last hidden states, `[B, T, H]`.
        """
        batch_size, length, _ = inputs_embeds.shape
        # All nodes are rows of one matrix; otherwise each projection would flatten its input again.
        fused = self.fuse(inputs_embeds.flatten(0, 1), hidden_states.flatten(0, 1))
        states, normed = fused if isinstance(fused, tuple) else (fused, None)
        if image_vector is not None:
            states = (states.view(batch_size, length, -1) + image_vector).flatten(0, 1)
        for number, layer in enumerate(self.layers):
            if normed is None:
                normed = layer.input_norm(states)
            shape = (batch_size, length)
            states = _layer(layer, number, states, normed, shape, cos, sin, attention_mask, cache, attend)
            normed = None
        if self.norm is not None:
            states = self.norm(states)
        return states.view(batch_size, length, -1)


def _layer(
    layer: PlainLayer,
    number: int,
    states: torch.Tensor,
    normed: torch.Tensor,
    shape: tuple[int, int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache,
    attend: Attention,
) -> torch.Tensor:
    batch_size, length = shape
    heads_shape = (batch_size, length, -1, layer.head_dim)
    queries = layer.query(normed).view(heads_shape)
    keys = layer.key(normed).view(heads_shape)
    values = layer.value(normed).view(heads_shape).transpose(1, 2)
    if layer.query_norm is not None and layer.key_norm is not None:
        queries, keys = layer.query_norm(queries), layer.key_norm(keys)
    num_heads, num_kv_heads = queries.shape[2], keys.shape[2]
    both = torch.cat([queries, keys], dim=2).transpose(1, 2)  # rotated together
    first, second = both.chunk(2, dim=-1)
    both = torch.addcmul(both * cos, torch.cat([-second, first], dim=-1), sin)
    queries, keys = both.split([num_heads, num_kv_heads], dim=1)
    keys, values = cache.update(keys, values, number)
    attended = attend(queries, keys, values, attention_mask, layer.scaling)
    attended = attended.transpose(1, 2).reshape(batch_size * length, -1)
    states = states + layer.output(attended)
    normed = layer.post_attention_norm(states)
    return states + layer.down(layer.activation(layer.gate(normed)) * layer.up(normed))


__all__ = ["Attention", "Fuse", "PlainForward", "PlainLayer"]
