"""Additive attention masks of chains and candidate trees over a cached context.

Masks are additive and in the model's dtype, because eager attention adds a mask as it is, and sdpa on a CPU misreads
other dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kv.slots import ContextSlots


@dataclass(frozen=True)
class Reach:
    """
    How far back the tokens of a kind of layer see. With neither argument they see everything before them.

    Args:
        window (`int`, *optional*): a token sees itself and the `window - 1` tokens before it.
        chunk (`int`, *optional*): the text is cut into chunks of this many tokens, counted from the first token that
            is not padding; a token sees itself and the tokens before it in its chunk.
        spares_prompt (`bool`): whether every token sees all of the prompt, whatever the limit.
    """

    window: int | None = None
    chunk: int | None = None
    spares_prompt: bool = False

    @property
    def most(self) -> int | None:
        """The most tokens that a token sees, itself included; `None`: no limit."""
        return self.window if self.chunk is None else self.chunk

    def first_seen(self, places: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """
        The first place that each token sees.

        Args:
            places (`torch.LongTensor` of shape `[B, T]`): places of the tokens in their text, padding counted.
            padding (`torch.LongTensor` of shape `[B]`, *optional*): number of padding tokens before each text.
        """
        if self.chunk is None:
            assert self.window is not None
            return places - self.window + 1
        start = 0 if padding is None else padding.unsqueeze(1)
        return start + (places - start).div(self.chunk, rounding_mode="floor") * self.chunk


EVERYTHING = Reach()


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible` (bool, any shape) is true, the dtype's minimum elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def chain_visibility(length: int, device: torch.device) -> torch.Tensor:
    """Which nodes of a chain each node sees, itself included: `[length, length]`."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def tree_attention_mask(
    visible: torch.Tensor,
    context: ContextSlots,
    dtype: torch.dtype,
    reach: Reach = EVERYTHING,
    depths: torch.Tensor | None = None,
    spared_slots: int = 0,
) -> torch.Tensor:
    """
    Builds the mask with which tree nodes attend to a cached context and to each other.

    Args:
        visible (`torch.BoolTensor` of shape `[B, T, E]`): which of E nodes behind the context each of T queries sees.
        context (`ContextSlots`): the context, S slots before the nodes.
        dtype (`torch.dtype`): dtype of the model.
        reach (`Reach`): how far back a token sees.
        depths (`torch.LongTensor` of shape `[B, E]`, *optional*): position of each node behind the context, 0 for the
            root. Needed if the reach is limited, and T = E then.
        spared_slots (`int`): slots of the prompt, if the reach spares it.

    Returns:
        `torch.Tensor` of shape `[B, 1, T, S + E]`.
    """
    batch_size, num_queries, num_nodes = visible.shape
    num_slots, device = context.num_slots, visible.device
    mask = torch.zeros(batch_size, 1, num_queries, num_slots + num_nodes, dtype=dtype, device=device)
    lowest = torch.finfo(dtype).min
    if reach.most is not None:
        assert depths is not None
        places = context.row_lengths(device).unsqueeze(1) + depths  # [B, T]
        first = reach.first_seen(places, context.padding(device))
        visible = visible & (places.unsqueeze(1) >= first.unsqueeze(2))
        slots = torch.arange(num_slots, device=device)
        outside = slots < first.unsqueeze(2)  # [B, T, S]
        if reach.spares_prompt:
            outside = outside & (slots >= spared_slots)
        mask[..., :num_slots].masked_fill_(outside.unsqueeze(1), lowest)
    mask[..., num_slots:].masked_fill_(~visible.unsqueeze(1), lowest)
    seen = context.mask(device)
    if seen is not None:
        mask[..., :num_slots].masked_fill_(~seen[:, None, None], lowest)
    return mask


def buffer_attention_mask(
    visible: torch.Tensor,
    depths: torch.Tensor,
    first_slot: torch.Tensor,
    context: ContextSlots,
    num_slots: int,
    dtype: torch.dtype,
    reach: Reach = EVERYTHING,
) -> torch.Tensor:
    """
    Builds the mask with which tree nodes attend to whole cache buffers. The slots of the nodes may be known to the
    device alone.

    Args:
        visible (`torch.BoolTensor` of shape `[B, N, N]`): which nodes each node sees.
        depths (`torch.LongTensor` of shape `[B, N]`): position of each node behind the context, 0 for the root.
        first_slot (`torch.LongTensor` of shape `[1]`): the slot of the first node.
        context (`ContextSlots`): gives the padding, and the length of each row if rows differ in length. If not, the
            context ends at `first_slot`.
        num_slots (`int`): slots of the buffers, S.
        dtype, reach: as in [`tree_attention_mask`].

    Returns:
        `torch.Tensor` of shape `[B, 1, N, S]`.
    """
    num_nodes, device = depths.shape[1], depths.device
    slots = torch.arange(num_slots, device=device)
    ends = context.row_lengths(device) if context.is_ragged else first_slot
    ends = ends.unsqueeze(1)  # [B, 1] or [1, 1]: the slot behind the context
    seen = (slots < ends).unsqueeze(1)
    prompt_mask = context.padded_prompt_mask(num_slots, device)
    if prompt_mask is not None:
        seen = seen & prompt_mask.unsqueeze(1)
    if reach.most is not None:
        places = ends + depths
        first = reach.first_seen(places, context.padding(device))
        visible = visible & (places.unsqueeze(1) >= first.unsqueeze(2))
        seen = seen & (slots >= first.unsqueeze(2))
    nodes = slots - first_slot  # the node in each slot
    is_node = (nodes >= 0) & (nodes < num_nodes)
    seen = torch.where(is_node, visible.index_select(2, nodes.clamp(0, num_nodes - 1)), seen)
    return additive_mask(seen, dtype).unsqueeze(1)


__all__ = ["EVERYTHING", "Reach", "additive_mask", "buffer_attention_mask", "chain_visibility", "tree_attention_mask"]
