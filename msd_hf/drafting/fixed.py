"""The drafting of a round with fixed shapes, as one compiled function: the pass over accepted tokens, all levels and
the finished tree. On a GPU the host then has one graph to launch instead of hundreds of small kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache

from ..attention.split import split_attention
from ..compiled.compile import run_compiled
from ..draft.modeling_msd import MSDDraftModel
from ..kv.fixed import Buffers, close_slots, reserve
from ..kv.slots import ContextSlots
from ..phases import phase
from ..tree.candidate import CandidateTree
from ..tree.growth import TreeGrowth, rows_of
from ..tree.settings import TreeSettings
from .head import DraftHead
from .step import DraftParts, draft_forward


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
        self.num_slots = self.max_tokens + settings.num_candidates  # that a drafting needs
        self.num_positions = self.max_tokens + settings.depth + 1  # that it goes beyond the last one
        self._rotations = torch.empty(0)  # cosines and sines of each position, [P, 2, head_dim]
        head.keep_address()

    def propose(
        self,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        counts: Sequence[int],
        next_position: torch.Tensor,
        last_position: int,
        context: ContextSlots,
        cache: Cache,
    ) -> CandidateTree:
        """
        Feeds the tokens that were emitted with the target's hidden states, which get slots behind the context, and
        grows trees from the last of them.

        Args:
            tokens (`torch.LongTensor` of shape `[B, max_tokens]`): the emitted tokens; then anything.
            hidden_states (`torch.Tensor` of shape `[B, max_tokens, H]`): the target's, at the position before each.
            counts (`Sequence[int]`): how many tokens each row has.
            next_position (`torch.LongTensor` of shape `[B, 1]`): position of the first of them.
            last_position (`int`): a bound of `next_position`, known without reading it back.
            context (`ContextSlots`): what the cache holds; is extended by these tokens.
            cache (`Cache`): the draft's, of `StaticSlotsLayer`s.
        """
        room = self.reserve(cache, context, last_position, hidden_states)
        # Tensors of inference mode, contiguous: with others all would be compiled anew.
        tokens, hidden_states, next_position = (
            part.clone(memory_format=torch.contiguous_format) for part in (tokens, hidden_states, next_position)
        )
        numbers = torch.tensor([list(counts), context.lengths], device=tokens.device)
        with phase("draft forward"):
            tree = self.draw(tokens, hidden_states, numbers, next_position, room)
        context.grow(counts)
        close_slots(cache, context.num_slots)
        return tree.clone()  # outlives the next compiled call

    @torch.inference_mode()  # whoever calls: with other tensors all would be compiled anew
    def reserve(self, cache: Cache, context: ContextSlots, last_position: int, states: torch.Tensor) -> DraftRoom:
        """
        Where the next tree can be drafted.

        Args:
            cache, context, last_position: as in `propose`.
            states (`torch.Tensor`): gives device and dtype.
        """
        buffers = reserve(cache, self.num_slots)
        capacity = buffers[0][0].shape[2]
        # The draft may hold fewer slots than there are positions. A power of two again, so that few are compiled.
        num_positions = max(capacity, last_position + self.num_positions)
        num_positions = 1 << (num_positions - 1).bit_length()
        if len(self._rotations) != num_positions:
            positions = torch.arange(num_positions, device=states.device).unsqueeze(0)
            cos, sin = self.head.draft.rotary_emb(states, positions)
            self._rotations = torch.stack([cos[0], sin[0]], dim=1)
        return DraftRoom(buffers, self._rotations, _padding(context, capacity, states.device))

    def draw(
        self,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        numbers: torch.Tensor,
        next_position: torch.Tensor,
        room: DraftRoom,
        cuda_graphs: bool = True,
    ) -> CandidateTree:
        """
        What `propose` does, on the device alone.

        Args:
            tokens, hidden_states, next_position: as in `propose`.
            numbers (`torch.LongTensor` of shape `[2, B]`): tokens of each row, and slots of its context.
            room (`DraftRoom`): what `reserve` gave.
            cuda_graphs (`bool`): see [`run_compiled`].
        """
        draft, settings = self.head.draft, self.settings
        capacity = room.buffers[0][0].shape[2]
        shape = (len(tokens), capacity, len(room.rotations), room.padding is None, settings)
        inputs = (tokens, hidden_states, numbers, next_position, room.padding, room.rotations, room.buffers)
        tokens, parents, depths, ancestors, scores = run_compiled(
            _draft_tree, shape, tokens.device, draft, self.head, settings, *inputs, cuda_graphs=cuda_graphs
        )
        return CandidateTree(tokens, parents, depths, ancestors, settings.depth + 1, scores)


@dataclass
class DraftRoom:
    """
    What a compiled drafting works in.

    Args:
        buffers (`list[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer, `[B, heads, S, head_dim]`.
        rotations (`torch.Tensor` of shape `[P, 2, head_dim]`): cosines and sines of each position.
        padding (`torch.BoolTensor` of shape `[B, S]`, *optional*): slots that hold padding.
    """

    buffers: list[Buffers]
    rotations: torch.Tensor
    padding: torch.Tensor | None


def _padding(context: ContextSlots, num_slots: int, device: torch.device) -> torch.Tensor | None:
    """Of so many slots those that hold padding, `[B, num_slots]`; `None` if none does."""
    mask = context.prompt_mask
    return None if mask is None else ~functional.pad(mask.to(device), (0, num_slots - mask.shape[1]), value=True)


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
        # What an odd candidate makes overflow stays in its slot, and what a mask hides is still multiplied by 0.
        keys[self.rows, :, self.places] = key_states.transpose(1, 2).nan_to_num(0.0, 0.0, 0.0)
        values[self.rows, :, self.places] = value_states.transpose(1, 2).nan_to_num(0.0, 0.0, 0.0)
        return keys, values


def _draft_tree(
    draft: MSDDraftModel,
    head: DraftHead,
    settings: TreeSettings,
    tokens: torch.Tensor,
    hidden_states: torch.Tensor,
    numbers: torch.Tensor,
    next_position: torch.Tensor,
    padding: torch.Tensor | None,
    rotations: torch.Tensor,
    buffers: Sequence[Buffers],
) -> tuple[torch.Tensor, ...]:
    counts, lengths = numbers.unbind(0)
    num_tokens, device, dtype = tokens.shape[1], tokens.device, draft.dtype
    steps = torch.arange(max(num_tokens, settings.top_k), device=device)
    slots = torch.arange(buffers[0][0].shape[2], device=device)
    lowest = torch.finfo(dtype).min
    parts = DraftParts.modules(draft)

    def run(tokens, states, positions, mask, first):
        """One forward; its rows take the slots from `first` (`[B]`) on."""
        embeds = head.target.embed(tokens).to(dtype)
        cos, sin = rotations[positions].unsqueeze(1).unbind(3)
        cache: Any = _PlacedSlots(buffers, first.unsqueeze(1) + steps[: tokens.shape[1]])
        live_slots = torch.stack([torch.zeros_like(first[0]), first[0] + tokens.shape[1]]).int()

        def attend(queries, keys, values, mask, scale):
            return split_attention(queries, keys, values, mask, scale, live_slots)

        return draft_forward(parts, embeds, states, cos, sin, mask.unsqueeze(1), cache, attend)

    # A token sees the context, those before it and itself.
    hidden = slots > (lengths.unsqueeze(1) + steps[:num_tokens]).unsqueeze(2)  # [B, A, S]
    if padding is not None:
        hidden = hidden | padding.unsqueeze(1)
    mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, lowest)
    states = run(tokens, hidden_states, next_position + steps[:num_tokens], mask, lengths)
    last = (counts - 1).unsqueeze(1)  # of each row's tokens
    roots = tokens.gather(1, last).squeeze(1)
    states = states.gather(1, last.unsqueeze(2).expand(-1, 1, states.shape[2]))
    mask = mask.gather(1, last.unsqueeze(2).expand(-1, 1, mask.shape[2]))
    next_position = next_position + counts.unsqueeze(1)
    first = lengths + counts

    growth = TreeGrowth(roots, settings)
    growth.expand(*head.static_top_k(states, settings.top_k))
    for level in range(settings.depth):
        level_tokens, above = growth.frontier_tokens, growth.above
        width = level_tokens.shape[1]
        own = slots == (first.unsqueeze(1) + steps[:width]).unsqueeze(2)  # [B, F, S]
        states, mask = rows_of(above, width, states, mask)
        mask = torch.where(own, 0.0, mask)
        positions = (next_position + level).expand(-1, width)
        states = run(level_tokens, states, positions, mask, first)
        first = first + width
        growth.expand(*head.static_top_k(states, settings.top_k))
    tree = growth.finish()
    if settings.top_k > 1:
        tree = tree.with_best_path_first()
    assert tree.scores is not None
    return tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores


__all__ = ["StaticDrafting"]
