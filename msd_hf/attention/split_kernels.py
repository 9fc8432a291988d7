"""Triton kernels of flash decoding: one attends to parts of the slots in parallel, the other joins the parts.

They have a module of their own because some builds of PyTorch come without Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


BLOCK_SLOTS = 64  # slots that a program reads at a time
BLOCK_ROWS = 64  # most rows of queries in a program; empty rows of a block cost as much as full ones
BLOCK_BYTES = 2**14  # most bytes of a block of keys, values or queries; heads with longer rows get shorter blocks
NUM_WARPS = 4
# Stages of the pipelined loads of keys and values. Processors of small GPUs (100 kB of memory) have room for two.
NUM_STAGES = min(
    (
        3 if getattr(torch.cuda.get_device_properties(number), "shared_memory_per_block_optin", 0) > 2**17 else 2
        for number in range(torch.cuda.device_count())
    ),
    default=2,
)
# Whether the results of parts are float32. The dtype of the queries halves the traffic between the kernels.
PARTS_IN_FLOAT32 = False
# Not tried on GPUs of other makers than Nvidia. Before capability 8.0 Triton uses no tensor cores and is slow.
IS_SUPPORTED = torch.version.hip is None and all(
    torch.cuda.get_device_capability(number) >= (8, 0) for number in range(torch.cuda.device_count())
)
MAX_PARTS = 64  # a program joins all parts at once
_MIN_BLOCK = 16  # smallest side of a matrix product
_JOINED_PER_WARP = 2048  # elements: 64 registers of each thread

_LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware computes exponentials to base 2
# Score of a hidden slot. The lowest number of the dtype would overflow when it is scaled.
_HIDDEN = tl.constexpr(-1e30)


def block_rows(num_rows: int, row_bytes: int) -> int:
    """How many rows of queries a program takes, given the bytes of a row; 0 if the kernels support no such rows."""
    most = min(BLOCK_ROWS, BLOCK_BYTES // row_bytes)
    return 0 if most < _MIN_BLOCK else min(most, max(_MIN_BLOCK, 1 << (num_rows - 1).bit_length()))


def attend_in_parts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    num_parts: int,
) -> torch.Tensor:
    """
    Attends to the parts of the slots in parallel, and joins the results.

    Args:
        queries (`torch.Tensor` of shape `[1, H, T, D]`): float16, bfloat16 or float32; D a power of two, at least 16.
        keys, values (`torch.Tensor` of shape `[1, Hk, S, D]`): in the dtype of the queries. Hk divides H.
        mask (`torch.Tensor` of shape `[1, 1, T, S]`): additive mask.
        bounds (`torch.IntTensor` of shape `[2]`): the first slot that a query sees, and the slot after the last one.
        scale (`float`): scale of the scores.
        num_parts (`int`): number of parts of the slots, at most `MAX_PARTS`.

    Returns:
        `torch.Tensor` of shape `[1, H, T, D]`. It lies in memory as `[T, H, D]`, as the output projection reads it.
    """
    _, num_heads, num_queries, head_dim = queries.shape
    num_kv_heads, num_slots = keys.shape[1], keys.shape[2]
    num_rows = num_heads // num_kv_heads * num_queries  # rows of queries that share a head of keys
    row_bytes = head_dim * queries.element_size()
    rows = block_rows(num_rows, row_bytes)
    slots = min(BLOCK_SLOTS, BLOCK_BYTES // row_bytes)
    dtype = torch.float32 if PARTS_IN_FLOAT32 else queries.dtype
    parts = queries.new_empty((num_parts, num_heads * num_queries, head_dim), dtype=dtype)
    log_sum_exps = queries.new_empty((num_parts, num_heads * num_queries), dtype=torch.float32)
    attended = queries.new_empty((num_queries, num_heads, head_dim))
    _attend_to_part[(num_kv_heads, num_parts, -(-num_rows // rows))](
        queries,
        keys,
        values,
        mask,
        bounds,
        parts,
        log_sum_exps,
        num_rows,
        num_queries,
        num_slots,
        queries.stride(1),
        queries.stride(2),
        queries.stride(3),
        keys.stride(1),
        keys.stride(2),
        keys.stride(3),
        values.stride(1),
        values.stride(2),
        values.stride(3),
        mask.stride(2),
        mask.stride(3),
        SCALE=scale,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=rows,
        BLOCK_SLOTS=slots,
        IS_EVEN=num_slots % slots == 0,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        num_warps=NUM_WARPS * (2 if queries.dtype == torch.float32 else 1),  # float32 products are made in registers
        num_stages=NUM_STAGES,
    )
    block_parts = 1 << (num_parts - 1).bit_length()
    _join_parts[(num_heads * num_queries,)](
        parts,
        log_sum_exps,
        attended,
        num_heads,
        num_queries,
        num_parts,
        HEAD_DIM=head_dim,
        BLOCK_PARTS=block_parts,
        num_warps=min(8, max(1, block_parts * head_dim // _JOINED_PER_WARP)),
    )
    return attended.transpose(0, 1).unsqueeze(0)


@triton.jit
def _attend_to_part(
    queries,
    keys,
    values,
    mask,
    bounds,
    parts,
    log_sum_exps,
    num_rows,
    num_queries,
    num_slots,
    query_head_stride,
    query_stride,
    query_dim_stride,
    key_head_stride,
    key_slot_stride,
    key_dim_stride,
    value_head_stride,
    value_slot_stride,
    value_dim_stride,
    mask_query_stride,
    mask_slot_stride,
    SCALE: tl.constexpr,  # as a plain argument, compiled code would make it and all results float64
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attends to the parts of the slots, with one program for each head of keys, part and block of rows. A program
    stores the attention output of its rows for its part, and the base-2 logarithm of their sums of exponentials; 0 and
    `-inf` for an empty part."""
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    row = tl.minimum(row, num_rows - 1)  # rows behind the end repeat the last one, so loads need no condition
    head = kv_head * (num_rows // num_queries) + row // num_queries
    query = row % num_queries
    dims = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, BLOCK_SLOTS)

    query_block = tl.load(
        queries + (head * query_head_stride + query * query_stride)[:, None] + (dims * query_dim_stride)[None, :]
    )
    key_offsets = (offsets * key_slot_stride)[:, None] + (dims * key_dim_stride)[None, :]
    value_offsets = (offsets * value_slot_stride)[:, None] + (dims * value_dim_stride)[None, :]
    mask_offsets = (query * mask_query_stride)[:, None] + (offsets * mask_slot_stride)[None, :]

    # A part consists of whole blocks, and parts differ by at most one block. In the first and the last block the mask
    # hides the slots outside the bounds.
    first_block = tl.load(bounds) // BLOCK_SLOTS
    num_blocks = tl.cdiv(tl.load(bounds + 1), BLOCK_SLOTS) - first_block
    begin = first_block + num_blocks * part // num_parts
    end = first_block + num_blocks * (part + 1) // num_parts

    # Offsets into long buffers may exceed 32 bits.
    start = begin.to(tl.int64) * BLOCK_SLOTS
    keys += kv_head.to(tl.int64) * key_head_stride + start * key_slot_stride
    values += kv_head.to(tl.int64) * value_head_stride + start * value_slot_stride
    mask += start * mask_slot_stride

    # If a row sees no slot of a block, its scores are close to `_HIDDEN`. Their weights are finite, and vanish beside
    # the weight of any slot that the row sees in another block or part.
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    attended = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    for block in range(begin, end):
        if IS_EVEN:
            key_block = tl.load(keys + key_offsets)
            value_block = tl.load(values + value_offsets)
            bias = tl.load(mask + mask_offsets)
        else:
            is_slot = block * BLOCK_SLOTS + offsets < num_slots
            key_block = tl.load(keys + key_offsets, is_slot[:, None], 0.0)
            value_block = tl.load(values + value_offsets, is_slot[:, None], 0.0)
            bias = tl.load(mask + mask_offsets, is_slot[None, :], 0.0)
        scores = tl.dot(query_block, tl.trans(key_block), input_precision=PRECISION) * (SCALE * _LOG2_E)
        scores += tl.maximum(bias.to(tl.float32), _HIDDEN) * _LOG2_E
        if not IS_EVEN:
            scores = tl.where(is_slot[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        decay = tl.exp2(highest - higher)
        total = total * decay + tl.sum(weights, 1)
        attended = attended * decay[:, None]
        attended = tl.dot(weights.to(value_block.dtype), value_block, attended, input_precision=PRECISION)
        highest = higher
        keys += BLOCK_SLOTS * key_slot_stride
        values += BLOCK_SLOTS * value_slot_stride
        mask += BLOCK_SLOTS * mask_slot_stride
    attended /= tl.where(total == 0.0, 1.0, total)[:, None]

    place = (part * tl.num_programs(0) + kv_head) * num_rows + row
    tl.store(log_sum_exps + place, highest + tl.log2(total), is_row)
    tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], attended.to(parts.dtype.element_ty), is_row[:, None])


@triton.jit
def _join_parts(
    parts,
    log_sum_exps,
    attended,
    num_heads,
    num_queries,
    num_parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Averages the results of the parts `[P, H, T, D]`, weighted with their sums of exponentials, with one program for
    each head and query."""
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK_PARTS)
    dims = tl.arange(0, HEAD_DIM)
    places = part * (num_heads * num_queries) + row
    is_part = part < num_parts
    log_shares = tl.load(log_sum_exps + places, is_part, float("-inf"))
    blocks = tl.load(parts + places[:, None] * HEAD_DIM + dims[None, :], is_part[:, None], 0.0)
    # If no part has a slot, the result is 0.
    shares = tl.exp2(log_shares - tl.maximum(tl.max(log_shares, 0), _HIDDEN * 2))
    total = tl.sum(shares, 0)
    joined = tl.sum(blocks.to(tl.float32) * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = row % num_queries * num_heads + row // num_queries
    tl.store(attended + place * HEAD_DIM + dims, joined.to(attended.dtype.element_ty))


__all__ = ["IS_SUPPORTED", "MAX_PARTS", "attend_in_parts", "block_rows"]
