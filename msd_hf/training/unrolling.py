"""Runs a draft on its own outputs in training, because it reads them deep in a tree (arXiv 2408.15766, 2503.01840)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..attention.unrolled import UnrolledPass
from .rows import DraftRows


def unrolled_states(draft: Callable, rows: DraftRows, num_passes: int = 1) -> Iterator[torch.Tensor]:
    """
    Yields the outputs `[B, L, H]` of `num_passes` passes of the draft, one pass after the other.

    Pass 0 reads the target's hidden states. In pass k row j reads the output of pass k - 1 at row j - 1 instead, and
    attends to the keys that it would see as a node at depth k of a tree: the rows up to j - k of pass 0, and row
    j - k + i of each pass i from 1 to k.

    Args:
        draft (`DraftPreTrainedModel` or a wrapper of it): the draft.
        rows: a batch of B samples of L rows, padded on the right.
        num_passes: number of passes.
    """
    layer_states, hidden_states = rows.reads.split(rows.hidden_states)
    states, unrolled = None, None
    for _ in range(num_passes):
        if states is not None:
            # The first row has no row before it; no row that counts sees it. From here on no row reads outputs of the
            # target's layers: the draft's own output stands for what it has read of the target.
            hidden_states = torch.cat([states[:, :1], states[:, :-1]], dim=1)
            layer_states = None
        unrolled = UnrolledPass(unrolled)
        states = draft(
            inputs_embeds=rows.inputs_embeds,
            hidden_states=hidden_states,
            visual_mask=rows.visual_mask,
            layer_states=layer_states,
            position_ids=rows.positions,
            unrolled=unrolled,
            use_cache=False,
        ).last_hidden_state
        yield states


__all__ = ["unrolled_states"]
