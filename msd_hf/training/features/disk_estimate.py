"""Estimates the disk space of features before they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...target.adapter import TargetAdapter
from ..data.conversations import Conversations
from ..data.encoding import ConversationEncoder
from ..disk import check_space, format_bytes
from ..visual_row_budget import kept_visual_positions
from .extraction import iterate_encoded, sample_visual_mask
from .storage import resolve_storage, sample_bytes, stored_rows


_NUM_PROBES = 64


@dataclass(frozen=True)
class DiskEstimate:
    """
    The estimated size of a feature cache.

    Args:
        num_samples, num_tokens, num_bytes: totals of the whole cache.
        storage: the number format, never `"auto"`.
    """

    num_samples: int
    num_tokens: int
    num_bytes: int
    storage: str

    def __str__(self) -> str:
        tokens = max(self.num_tokens, 1)
        return (
            f"about {format_bytes(self.num_bytes)} as {self.storage} ({self.num_samples:,} samples of "
            f"{tokens / max(self.num_samples, 1):,.0f} tokens, {self.num_bytes / tokens:,.0f} bytes a token)"
        )


def estimate_disk(
    target: PreTrainedModel,
    processor: Any,
    conversations: Conversations,
    *,
    max_length: int = 2048,
    storage: str = "auto",
    feature_layers: Sequence[int] | None = None,
    all_hidden_states: bool = False,
    max_visual_rows: int | None = None,
) -> DiskEstimate:
    """
    Estimates the disk space that [`extract_features`] needs with the same arguments. At most 64 evenly spaced samples
    are encoded; the target does not run.
    """
    adapter = TargetAdapter(target, feature_layers=feature_layers)
    storage = resolve_storage(storage, target.dtype)
    hidden_size = target.config.get_text_config(decoder=True).hidden_size
    width = adapter.reads.width
    num_probes = min(_NUM_PROBES, len(conversations))
    # One sample from the middle of each of `num_probes` equal parts, because data are often sorted.
    indices = [(2 * number + 1) * len(conversations) // (2 * num_probes) for number in range(num_probes)]
    num_samples = num_tokens = num_bytes = 0
    for item in iterate_encoded(conversations, ConversationEncoder(processor, max_length), indices):
        if item.error is None:
            visual_mask = sample_visual_mask(adapter, item.inputs)
            kept = kept_visual_positions(visual_mask, max_visual_rows)
            rows = stored_rows(item.inputs["assistant_mask"], visual_mask, all_hidden_states, kept)
            num_samples += 1
            num_tokens += len(rows)
            num_bytes += sample_bytes(len(rows), int(kept.sum()), int(rows.sum()), hidden_size, width, storage)
    factor = len(conversations) / max(num_probes, 1)
    return DiskEstimate(round(factor * num_samples), round(factor * num_tokens), round(factor * num_bytes), storage)


def check_disk(folder: Path, num_bytes: int) -> None:
    """
    Checks that the disk of `folder` has `num_bytes` left. The folder need not exist yet.

    Raises:
        MSDError: when less is left.
    """
    check_space(
        folder,
        num_bytes,
        "The features",
        'Use fewer samples, another disk, a smaller `storage` ("int8" is the smallest) or `max_visual_rows`, or train '
        "without a cache.",
    )


__all__ = ["DiskEstimate", "check_disk", "estimate_disk"]
