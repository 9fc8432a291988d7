"""The positions of a draft in vLLM where the engine hands it those of the target."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import MSDUnsupportedError


def sequence_positions(metadata: Any, num_tokens: int) -> torch.Tensor:
    """
    The place of each token in its own sequence. Nothing is read back to the host.

    Args:
        metadata: attention metadata of vLLM: `query_start_loc` `[B + 1]`, the first token of each sequence in the
            batch, and `seq_lens` `[B]`, the length of each sequence with these tokens.
        num_tokens (`int`): tokens of the batch, T.

    Returns:
        `torch.LongTensor` of shape `[T]`.

    Raises:
        MSDUnsupportedError: when the attention backend keeps other metadata.
    """
    try:
        starts, lengths = metadata.query_start_loc, metadata.seq_lens
    except AttributeError as error:
        raise MSDUnsupportedError(
            f"An MSD draft for a target with M-RoPE cannot tell its positions from a `{type(metadata).__name__}`: "
            "choose another attention backend for the draft in --speculative-config, for example "
            '"attention_backend": "TRITON_ATTN", or set VLLM_USE_V2_MODEL_RUNNER=1.'
        ) from error
    num_rows = len(lengths)
    ends = starts[1 : num_rows + 1]
    # Added to the number of a token in the batch, this is its position.
    shifts = lengths - ends
    tokens = torch.arange(num_tokens, device=starts.device, dtype=ends.dtype)
    rows = torch.searchsorted(ends.contiguous(), tokens, right=True).clamp_(max=num_rows - 1)
    return (tokens + shifts[rows]).long()


__all__ = ["sequence_positions"]
