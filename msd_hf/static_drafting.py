"""The drafting of a round with fixed shapes, as one compiled function: the pass over accepted tokens, all levels and
the finished tree. On a GPU the host then has one graph to launch instead of hundreds of small kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache

from .attention_mask import ContextSlots
from .compiled import run_compiled
from .draft_head import DraftHead
from .drafting_step import draft_forward
from .modeling_msd import MSDDraftModel
from .phases import phase
from .static_cache import Buffers, close_slots
from .tree import CandidateTree, TreeGrowth, TreeSettings, rows_of


class StaticDrafting:
    """
    Drafts trees that are always as large as they may be.

    Args:
        head (`DraftHead`): of a draft that is plain, see [`DraftingStep`].
        settings (`TreeSettings`): the size of each tree, not automatic.
    """

    def __init__(self, head: DraftHead, settings: TreeSettings):
        self.head = head
        self.settings = settings
        self.max_tokens = settings.depth + 2 + settings.suffix_nodes  # that a round may emit
        head.keep_address()

    def propose(
        self,
        roots: torch.Tensor,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        counts: Sequence[int],
        rotations: torch.Tensor,
        context: ContextSlots,
        cache: Cache,
    ) -> CandidateTree:
        """
        Feeds the tokens that were emitted with the target's hidden states, which get slots behind the context, and
        grows trees from the last of them.

        Args:
            roots (`torch.LongTensor` of shape `[B]`): the last emitted tokens.
            tokens (`torch.LongTensor` of shape `[B, A]`): the emitted tokens, at most `max_tokens`; then anything.
            hidden_states (`torch.Tensor` of shape `[B, A, H]`): the target's, at the position before each.
            counts (`Sequence[int]`): how many tokens each row has.
            rotations (`torch.Tensor` of shape `[B, max_tokens + depth, 2, head_dim]`): cosines and sines of the
                positions from the first of `tokens` on.
            context (`ContextSlots`): what the cache holds; is extended by these tokens.
            cache (`Cache`): the draft's, of `StaticSlotsLayer`s.
        """
        draft, settings = self.head.draft, self.settings
        missing = self.max_tokens - tokens.shape[1]
        if missing:
            tokens = functional.pad(tokens, (0, missing))
            hidden_states = functional.pad(hidden_states, (0, 0, 0, missing))
        buffers = [layer.reserve(self.max_tokens + settings.num_candidates) for layer in cache.layers]
        capacity = buffers[0][0].shape[2]
        seen = _seen_slots(context, capacity, roots.device)
        shape = (*tokens.shape, capacity, settings)
        lengths = context.row_lengths(roots.device)
        # Other strides would be compiled anew.
        roots, tokens, hidden_states = (
            part.clone(memory_format=torch.contiguous_format) for part in (roots, tokens, hidden_states)
        )
        inputs = (roots, tokens, hidden_states, rotations, torch.tensor(counts, device=roots.device), lengths, seen)
        with phase("draft forward"):
            parts = run_compiled(_draft_tree, shape, roots.device, draft, self.head, settings, *inputs, buffers)
        context.grow(counts)
        close_slots(cache, context.num_slots)
        tokens, parents, depths, ancestors, scores = (part.clone() for part in parts)  # outlive the next compiled call
        return CandidateTree(tokens, parents, depths, ancestors, settings.depth + 1, scores)


def _seen_slots(context: ContextSlots, num_slots: int, device: torch.device) -> torch.Tensor:
    """Of so many slots those that hold the context of each row, `[B, num_slots]`."""
    seen = torch.arange(num_slots, device=device) < context.row_lengths(device).unsqueeze(1)
    if context.prompt_mask is not None:
        seen[:, : context.prompt_mask.shape[1]] &= context.prompt_mask.to(device)
    return seen


class _PlacedSlots:
    """The draft's cache inside of compiled code: new slots go to given places, and attention gets all slots there are.

    Args:
        buffers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer.
        places (`torch.LongTensor` of shape `[B, T]`): of the new slots in each row.
    """

    def __init__(self, buffers: Sequence[Buffers], places: torch.Tensor):
        self.buffers = buffers
        self.places = places
        self.rows = torch.arange(len(places), device=places.device).unsqueeze(1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> Buffers:
        keys, values = self.buffers[layer_idx]
        keys[self.rows, :, self.places] = key_states.transpose(1, 2)
        values[self.rows, :, self.places] = value_states.transpose(1, 2)
        return keys, values


def _draft_tree(
    draft: MSDDraftModel,
    head: DraftHead,
    settings: TreeSettings,
    roots: torch.Tensor,
    tokens: torch.Tensor,
    hidden_states: torch.Tensor,
    rotations: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    buffers: Sequence[Buffers],
) -> tuple[torch.Tensor, ...]:
    num_tokens = tokens.shape[1]
    slots = torch.arange(seen.shape[1], device=roots.device)
    lowest, dtype = torch.finfo(draft.dtype).min, draft.dtype

    def run(tokens, states, rotation, mask, first):
        """One forward; its rows take the slots from `first` (`[B]`) on."""
        embeds = head.target.embed(tokens).to(dtype)
        cos, sin = rotation.unsqueeze(1).unbind(3)
        cache: Any = _PlacedSlots(buffers, first.unsqueeze(1) + steps[: tokens.shape[1]])
        return draft_forward(draft, embeds, states.to(dtype), cos, sin, mask.unsqueeze(1), cache)

    steps = torch.arange(max(num_tokens, settings.top_k), device=roots.device)
    behind = slots - lengths[:, None, None]  # [B, 1, S]
    chain = seen.unsqueeze(1) | ((behind >= 0) & (behind <= steps[:num_tokens].unsqueeze(1)))  # [B, A, S]
    mask = torch.zeros_like(chain, dtype=dtype).masked_fill(~chain, lowest)
    states = run(tokens, hidden_states, rotations[:, :num_tokens], mask, lengths)
    last = (counts - 1)[:, None, None]
    states = states.gather(1, last.expand(-1, 1, states.shape[2]))
    mask = mask.gather(1, last.expand(-1, 1, mask.shape[2]))  # of the last token: all before it, and itself

    growth = TreeGrowth(roots, settings)
    growth.expand(*head.best(head.logits(states), settings.top_k))
    first = lengths + counts
    for level in range(settings.depth):
        level_tokens, above = growth.descend(settings.top_k)
        width = level_tokens.shape[1]
        own = slots == (first.unsqueeze(1) + steps[:width]).unsqueeze(2)  # [B, F, S]
        mask = torch.where(own, 0.0, rows_of(mask, above, width))
        place = (counts + level)[:, None, None, None].expand(-1, 1, *rotations.shape[2:])
        rotation = rotations.gather(1, place).expand(-1, width, -1, -1)
        states = run(level_tokens, rows_of(states, above, width), rotation, mask, first)
        first = first + width
        growth.expand(*head.best(head.logits(states), settings.top_k))
    tree = growth.finish()
    if settings.top_k > 1:
        tree = tree.with_best_path_first()
    assert tree.scores is not None
    return tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores


__all__ = ["StaticDrafting"]
