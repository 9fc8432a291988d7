"""Runs a draft on its own outputs in training, because it reads them deep in a tree (arXiv 2408.15766, 2503.01840)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache

from ..attention.masks import additive_mask
from .rows import DraftRows


def unrolled_states(
    draft: Callable, rows: DraftRows, num_passes: int = 1, noisy_states: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """
    Yields the outputs `[B, L, H]` of `num_passes` passes of the draft, one pass after the other.

    Pass 0 reads the target's hidden states. In pass k row j reads the output of pass k - 1 at row j - 1 instead, and
    attends to the keys that it would see as a node at depth k of a tree: the rows up to j - k of pass 0, and row
    j - k + i of each pass i from 1 to k.

    Args:
        draft (`MSDDraftModel` or a wrapper of it): the draft.
        rows: a batch of B samples of L rows, padded on the right.
        num_passes: number of passes.
        noisy_states (`torch.Tensor` of shape `[B, L, W]`, *optional*): read by pass 0 in place of
            `rows.hidden_states`.
    """
    given = rows.hidden_states if noisy_states is None else noisy_states
    layer_states, hidden_states = rows.reads.split(given)
    batch_size, length = rows.visual_mask.shape
    device = rows.visual_mask.device
    position_ids = torch.arange(length, device=device).expand(batch_size, -1)
    cache = DynamicCache() if num_passes > 1 else None
    states = None
    visual_mask = rows.visual_mask
    if rows.unread is not None:
        visual_mask = visual_mask & ~rows.unread  # a vector of all images is one of the rows that are read
    for pass_index in range(num_passes):
        mask = None
        if states is not None:
            # The first row has no row before it and keeps the target's last hidden state. From here on no row reads
            # outputs of the target's layers, because the draft's own output stands for the last hidden state alone.
            hidden_states = torch.cat([hidden_states[:, :1].to(states.dtype), states[:, :-1]], dim=1)
            layer_states = None
        if states is not None or rows.unread is not None:
            mask = unrolled_mask(length, pass_index, hidden_states.dtype, device, rows.unread)
        states = draft(
            inputs_embeds=rows.inputs_embeds,
            hidden_states=hidden_states,
            visual_mask=visual_mask,
            layer_states=layer_states,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        yield states


def unrolled_mask(
    length: int, pass_index: int, dtype: torch.dtype, device: torch.device, unread: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The additive mask `[B, 1, L, (pass_index + 1) * L]` of a pass over the keys of all passes so far.

    Args:
        length: number of rows, L.
        pass_index: number of the pass, from 0.
        unread (`torch.BoolTensor` of shape `[B, L]`, *optional*): rows of pass 0 that no other row sees. Without
            them the mask is the same for all samples, and B is 1.
    """
    rows = torch.arange(length, device=device)
    distance = (rows.unsqueeze(1) - rows).unsqueeze(0)  # [1, L, L], from key to query
    first = distance >= pass_index
    if unread is not None:
        # A row that sees no key at all would have no output, so an unread row sees itself.
        first = first & ~(unread.unsqueeze(1) & (distance > 0))
    blocks = [first]
    blocks += [(distance == pass_index - earlier).expand_as(first) for earlier in range(1, pass_index + 1)]
    # The first `pass_index` rows see no key of pass 0. They are not trained in this pass.
    return additive_mask(torch.cat(blocks, dim=2), dtype).unsqueeze(1)


__all__ = ["unrolled_mask", "unrolled_states"]
