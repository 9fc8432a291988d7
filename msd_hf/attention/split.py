"""Attention of few queries to long buffers, computed for several parts of the buffers at a time.

A kernel that gives each head to one processor leaves most of a GPU idle where the queries are a tree and the keys a
whole context. Parts of the keys are attended to side by side here, as in flash decoding, and joined by their
log-sum-exps.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


SPLIT_SDPA = "msd_split_sdpa"
LIVE_SLOTS = "msd_live_slots"  # argument of decoders that hand on what they do not know to their attention

NUM_PROGRAMS = 128  # of heads, parts and blocks of queries, at most: as many as large GPUs have processors
_MIN_SLOTS = 128  # of a part
_DEVICE = "cuda"  # that the kernels are for
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # not with all builds of PyTorch


def split_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    live_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attends as `scaled_dot_product_attention` does; on a GPU to several parts of the slots at a time, and only to those
    between the first and the last that some query sees.

    Args:
        queries (`torch.Tensor` of shape `[B, H, T, D]`).
        keys, values (`torch.Tensor` of shape `[B, Hk, S, D]`): Hk divides H; H / Hk successive heads of queries
            share one of keys. What hidden slots hold is finite.
        mask (`torch.Tensor` of shape `[B, 1, T, S]`, *optional*): additive, of the dtype of the queries. Hides a slot
            with the lowest number of the dtype. Each query sees some slot.
        scale (`float`, *optional*): of the scores; by default `D ** -0.5`.
        live_slots (`torch.IntTensor` of shape `[2]`, *optional*): what `find_live_slots` gives for the mask, or a
            wider range. Layers with the same mask need not find it each.

    Returns:
        `torch.Tensor` of shape `[B, H, T, D]`.
    """
    if mask is not None:
        num_parts = _num_parts(queries, keys, values, mask)
        if num_parts > 1:
            from .split_kernels import attend_in_parts

            scale = queries.shape[3] ** -0.5 if scale is None else scale
            live_slots = find_live_slots(mask) if live_slots is None else live_slots
            return attend_in_parts(queries, keys, values, mask, live_slots, scale, num_parts)
    return grouped_sdpa(queries, keys, values, mask, scale)


def _num_parts(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> int:
    """How many parts to make of the slots; 1 also where the kernels cannot do it."""
    batch_size, num_heads, num_queries, head_dim = queries.shape
    num_kv_heads, num_slots = keys.shape[1], keys.shape[2]
    if (
        not _HAS_TRITON
        or queries.device.type != _DEVICE
        or batch_size != 1
        or head_dim < 16
        or head_dim & (head_dim - 1) != 0  # no power of two
        or keys.shape != values.shape
        or mask.shape != (1, 1, num_queries, num_slots)
        or not mask.is_floating_point()
        or queries.dtype not in _DTYPES
        or not queries.dtype == keys.dtype == values.dtype
        # The kernels have no backward pass.
        or (torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad or values.requires_grad))
    ):
        return 1
    from .split_kernels import IS_SUPPORTED, MAX_PARTS, block_rows

    if not IS_SUPPORTED:
        return 1
    num_rows = num_heads // num_kv_heads * num_queries
    rows = block_rows(num_rows, head_dim * queries.element_size())
    if rows == 0:
        return 1
    programs = num_kv_heads * -(-num_rows // rows)
    return max(1, min(NUM_PROGRAMS // programs, num_slots // _MIN_SLOTS, MAX_PARTS))


def find_live_slots(mask: torch.Tensor) -> torch.Tensor:
    """Of a mask `[B, 1, T, S]`, the first slot that a query sees and the one behind the last: int32, `[2]`."""
    num_slots = mask.shape[3]
    is_live = (mask > torch.finfo(mask.dtype).min).flatten(0, 2).any(0)
    slots = torch.arange(num_slots, dtype=torch.int32, device=mask.device)
    first = torch.where(is_live, slots, num_slots).amin()
    end = torch.where(is_live, slots + 1, 0).amax()
    return torch.stack([first, end])


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    msd_live_slots: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers."""
    if (
        attention_mask is None
        or attention_mask.shape[1:] != (1, query.shape[2], key.shape[2])
        or kwargs.get("position_bias") is not None
        or kwargs.get("softcap") is not None
        or kwargs.get("dropout")
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attended = split_attention(query, key, value, attention_mask, scaling, msd_live_slots)
    return attended.transpose(1, 2).contiguous(), None


def grouped_sdpa(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of the same arguments as `split_attention`. The queries of a group stand behind
    each other, so that keys need not be repeated for them."""
    batch_size, num_heads, _, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    grouped = queries
    if num_kv_heads < num_heads:
        grouped = queries.reshape(batch_size, num_kv_heads, -1, head_dim)
        mask = None if mask is None else mask.repeat(1, 1, num_heads // num_kv_heads, 1)
    attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(*queries.shape[:3], values.shape[3])


AttentionInterface.register(SPLIT_SDPA, _forward)
AttentionMaskInterface.register(SPLIT_SDPA, sdpa_mask)


__all__ = ["LIVE_SLOTS", "SPLIT_SDPA", "find_live_slots", "grouped_sdpa", "split_attention"]
