"""Attention of few queries to long buffers, computed for several parts of the buffers in parallel.

A kernel that gives each head to one processor leaves most of a GPU idle when the queries are a tree and the keys a
whole context. Here, as in flash decoding, the queries attend to several parts of the keys in parallel, and the results
are joined by their log-sum-exps.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward


LIVE_SLOTS = "msd_live_slots"  # keyword argument of a decoder that passes unknown arguments on to its attention

# Largest number of programs: heads x parts x blocks of queries. Large GPUs have about as many processors.
NUM_PROGRAMS = 128
_MIN_SLOTS = 128  # smallest part
_DEVICE = "cuda"  # device type that the kernels run on
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # some builds of PyTorch come without it


def split_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    live_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Computes `scaled_dot_product_attention`. On a GPU it reads several parts of the slots in parallel, and skips the
    slots before the first and after the last that some query sees.

    Args:
        queries (`torch.Tensor` of shape `[B, H, T, D]`).
        keys, values (`torch.Tensor` of shape `[B, Hk, S, D]`): Hk divides H; H / Hk successive heads of queries
            share one head of keys. Hidden slots must hold finite values.
        mask (`torch.Tensor` of shape `[B, 1, T, S]`, *optional*): additive mask, in the dtype of the queries. The
            lowest number of the dtype hides a slot. Each query must see at least one slot.
        scale (`float`, *optional*): scale of the scores; by default `D ** -0.5`.
        live_slots (`torch.IntTensor` of shape `[2]`, *optional*): the result of `find_live_slots` for the mask, or a
            wider range. Several layers with the same mask share one computation if it is given.

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
    """The number of parts to split the slots into; 1 also if the kernels do not support the arguments."""
    batch_size, num_heads, num_queries, head_dim = queries.shape
    num_kv_heads, num_slots = keys.shape[1], keys.shape[2]
    if (
        not _HAS_TRITON
        or queries.device.type != _DEVICE
        or batch_size != 1
        or head_dim < 16
        or head_dim & (head_dim - 1) != 0  # not a power of two
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
    """The first slot that some query sees (mask `[B, 1, T, S]`), and the slot after the last one: int32, `[2]`."""
    num_slots = mask.shape[3]
    is_live = (mask > torch.finfo(mask.dtype).min).flatten(0, 2).any(0)
    slots = torch.arange(num_slots, dtype=torch.int32, device=mask.device)
    first = torch.where(is_live, slots, num_slots).amin()
    end = torch.where(is_live, slots + 1, 0).amax()
    return torch.stack([first, end])


def split_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    msd_live_slots: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`split_attention` with the signature that transformers expects of an attention function. Calls with arguments
    that it does not support go to sdpa."""
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
    """`scaled_dot_product_attention` with the arguments of `split_attention`. Heads of queries that share a head of
    keys are treated as one head with more queries, so that the keys need not be repeated."""
    batch_size, num_heads, _, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    grouped = queries
    if num_kv_heads < num_heads:
        grouped = queries.reshape(batch_size, num_kv_heads, -1, head_dim)
        mask = None if mask is None else mask.repeat(1, 1, num_heads // num_kv_heads, 1)
    attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(*queries.shape[:3], values.shape[3])


__all__ = ["LIVE_SLOTS", "find_live_slots", "grouped_sdpa", "split_attention", "split_sdpa"]
