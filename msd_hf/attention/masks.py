"""Additive attention masks of candidate trees over a cached context."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..kv.slots import ContextSlots


def tree_attention_mask(
    visible: torch.Tensor,
    context: ContextSlots,
    dtype: torch.dtype,
    window: int | None = None,
    depths: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The additive attention mask of tree nodes over a cached context and the nodes themselves. Additive and in the
    model's dtype because eager attention adds a mask as it is, and because sdpa on CPU mistakes other dtypes.

    Args:
        visible (`torch.BoolTensor` of shape `[B, T, E]`): which of E nodes behind the context each of T queries sees.
        context (`ContextSlots`): of S slots, which come before the nodes.
        dtype (`torch.dtype`): dtype of the model.
        window (`int`, *optional*): of a sliding-window layer: no token sees another one `window` or more before it.
        depths (`torch.LongTensor` of shape `[B, E]`, *optional*): with a window, where T = E: how far behind the
            context each node stands.

    Returns:
        `torch.Tensor` of shape `[B, 1, T, S + E]`: 0 where attention is allowed, the dtype's minimum elsewhere.
    """
    batch_size, num_queries, num_nodes = visible.shape
    num_slots, device = context.num_slots, visible.device
    mask = torch.zeros(batch_size, 1, num_queries, num_slots + num_nodes, dtype=dtype, device=device)
    lowest = torch.finfo(dtype).min
    if window is not None:
        assert depths is not None
        visible = visible & (depths.unsqueeze(2) - depths.unsqueeze(1) < window)
        first = context.row_lengths(device).unsqueeze(1) + depths - window + 1  # [B, T]: first slot in the window
        outside = torch.arange(num_slots, device=device) < first.unsqueeze(2)  # [B, T, S]
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
    window: int | None = None,
) -> torch.Tensor:
    """
    The same for whole buffers, into which the nodes go at a place that only the device has to know.

    Args:
        visible (`torch.BoolTensor` of shape `[B, N, N]`): which nodes each node sees.
        depths (`torch.LongTensor` of shape `[B, N]`): how far behind the context each node stands.
        first_slot (`torch.LongTensor` of shape `[1]`): of the nodes.
        context (`ContextSlots`): gives padding; and what each row uses, if some use less than others. Otherwise the
            context reaches up to the nodes.
        num_slots (`int`): of the buffers, S.
        dtype, window: as in [`tree_attention_mask`].

    Returns:
        `torch.Tensor` of shape `[B, 1, N, S]`.
    """
    batch_size, num_nodes = depths.shape
    device = depths.device
    slots = torch.arange(num_slots, device=device)
    ends = context.row_lengths(device) if context.is_ragged else first_slot  # of the context
    ends = ends.unsqueeze(1)  # [B, 1], or one for all rows
    seen = (slots < ends).unsqueeze(1)
    if context.prompt_mask is not None:
        missing = num_slots - context.prompt_mask.shape[1]
        seen = seen & functional.pad(context.prompt_mask.to(device), (0, missing), value=True).unsqueeze(1)
    if window is not None:
        visible = visible & (depths.unsqueeze(2) - depths.unsqueeze(1) < window)
        seen = seen & (slots >= (ends + depths - window + 1).unsqueeze(2))
    nodes = slots - first_slot  # which node has that slot
    is_node = (nodes >= 0) & (nodes < num_nodes)
    seen = torch.where(is_node, visible.index_select(2, nodes.clamp(0, num_nodes - 1)), seen)
    mask = torch.zeros(batch_size, num_nodes, num_slots, dtype=dtype, device=device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


__all__ = ["buffer_attention_mask", "tree_attention_mask"]
