"""Drafting with fixed shapes: all drafting of a round is one compiled function, from the accepted tokens to the tree.

On a GPU the host then launches one graph instead of hundreds of small kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from ..attention.masks import additive_mask
from ..attention.split import split_attention
from ..compiled.compile import CompiledFunctions
from ..draft.interface import Draft
from ..kv.fixed import SpareBuffers, close_slots, make_fixed, reserve
from ..kv.in_place import KeysAndValues
from ..kv.slots import ContextSlots
from ..observer import phase
from ..target.adapter import TargetAdapter, TargetPrefill
from ..tree.candidate import CandidateTree
from ..tree.growth import TreeGrowth, rows_of
from ..tree.policy import TreePolicy
from ..tree.settings import TreeSettings
from .drafter import Drafter
from .head import DraftHead
from .levels import grow_levels
from .memory import ChatMemory
from .step import rotary_table


@dataclass
class FixedState:
    """
    The state of a `FixedDrafter` between two rounds.

    Args:
        tokens (`torch.LongTensor` of shape `[B, A]`): tokens to feed next, then padding.
        hidden_states (`torch.Tensor` of shape `[B, A, W]`): hidden states of the target at the position before each
            token.
        counts (`list[int]`): number of tokens of each row.
        next_position (`torch.LongTensor` of shape `[B, 1]`): position of the first token of each row.
        last_position (`int`): upper bound of the positions of all rows.
        context (`ContextSlots`): the slots of the draft's cache that hold the context.
        image_vector (`torch.Tensor` of shape `[B, 1, H]`, *optional*): see [`Draft.image_vectors`].
    """

    tokens: torch.Tensor
    hidden_states: torch.Tensor
    counts: list[int]
    next_position: torch.Tensor
    last_position: int
    context: ContextSlots
    image_vector: torch.Tensor | None


@dataclass
class DraftRoom:
    """
    The tensors that a compiled drafting works in.

    Args:
        buffers (`list[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer, `[B, heads, S, head_dim]`.
        rotations (`torch.Tensor` of shape `[P, 2, head_dim]`): cosines and sines of each position.
        padding (`torch.BoolTensor` of shape `[B, S]`, *optional*): true at slots that hold padding.
    """

    buffers: list[KeysAndValues]
    rotations: torch.Tensor
    padding: torch.Tensor | None


class FixedDrafter(Drafter):
    """
    Drafts trees that always have the same shape.

    Args:
        draft (`Draft`): a plain draft, see [`Draft.is_plain`], that reads the last hidden state alone.
        target (`TargetAdapter`): lends its embedding and head.
        settings (`TreeSettings`): the size of every tree, not automatic. Near the length limit trees keep this size;
            the limits of a round only say whether to draft.
        compiled (`CompiledFunctions`): keeps the compiled drafting.
        spares (`SpareBuffers`): cache buffers that earlier calls of the draft have left.
        max_visual_rows (`int`, *optional*): argument of [`Drafter`].
    """

    block_length: int

    def __init__(
        self,
        draft: Draft,
        target: TargetAdapter,
        settings: TreeSettings,
        compiled: CompiledFunctions,
        spares: SpareBuffers,
        max_visual_rows: int | None = None,
    ):
        super().__init__(draft, target, max_visual_rows=max_visual_rows)
        self.settings = settings
        self.block_length = settings.depth + 2 + settings.suffix_nodes  # the most tokens that a round can emit
        self.num_slots = self.block_length + settings.num_candidates  # slots that a drafting writes to
        self.num_positions = self.block_length + settings.depth + 1  # positions that it needs
        self._compiled = compiled
        self._spares = spares
        self._rotations = torch.empty(0)
        self._head.keep_address()

    def prefill(self, prefill: TargetPrefill, tokens: torch.Tensor, past: ChatMemory | None = None) -> None:
        prompt = self._feed_prompt(prefill, tokens, past)
        self.last_hidden_state = prompt.hidden_states[:, -1:].clone()
        # The last row of the prompt is fed again as an accepted token, so that the first round is like all others.
        self._slots.take_back_last()
        missing = self.block_length - 1
        self._next_positions = self._next_positions - 1
        row = functional.pad(tokens.unsqueeze(1).to(self.device), (0, missing))
        states = functional.pad(self.last_hidden_state, (0, 0, 0, missing))
        self._pending = [(row, states, [1] * len(tokens))]

    def _prepare_cache(self) -> None:
        make_fixed(self.cache, self._spares, self.draft.num_cache_layers)

    def accept(self, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]) -> None:
        super().accept(tokens, hidden_states, counts)
        if len(counts) == 1:
            self.last_hidden_state = hidden_states[:, counts[0] - 1 : counts[0]]

    @torch.inference_mode()  # so that it writes tensors of the mode of `propose`
    def feed_pending(self) -> None:
        pending, self._pending = self._pending, []
        for tokens, hidden_states, counts in pending:
            length = max(counts)
            self._feed(tokens.narrow(1, 0, length), hidden_states.narrow(1, 0, length), counts)

    @torch.inference_mode()  # in any caller's mode: for tensors of another mode the code would be compiled again
    def propose(self, roots: torch.Tensor, limits: TreeSettings) -> CandidateTree:
        state = self.state
        self._pending = []
        counts, context = state.counts, self._slots.context
        # Copying a list to a GPU waits for all queued work, so the positions are made before drafting is queued.
        self._next_positions = state.next_position + torch.tensor(counts, device=self.device).unsqueeze(1)
        room = self.reserve(context, state.last_position, state.hidden_states)
        # Copies are contiguous tensors of inference mode. For any others the code would be compiled again.
        tokens, hidden_states, next_position = (
            part.clone(memory_format=torch.contiguous_format)
            for part in (state.tokens, state.hidden_states, state.next_position)
        )
        image_vector = state.image_vector
        if image_vector is not None:
            image_vector = image_vector.clone(memory_format=torch.contiguous_format)
        lengths = torch.tensor([counts, context.lengths], device=self.device)
        with phase("draft forward"):
            tree = self.draft_tree(tokens, hidden_states, lengths, next_position, room, image_vector)
        context.grow(counts)
        close_slots(self.cache, context.num_slots)
        self._last_position += max(counts)
        return tree.clone()  # a copy, because the next compiled call overwrites the tree

    @property
    def state(self) -> FixedState:
        """The state between two rounds, for code that runs the next rounds itself and then calls `resume`."""
        ((tokens, hidden_states, counts),) = self._pending
        return FixedState(
            tokens,
            self._to_draft(hidden_states),
            list(counts),
            self._positions_ahead(1),
            self._last_position,
            replace(self._slots.context),
            self._image_vector,
        )

    def resume(
        self, context: ContextSlots, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]
    ) -> None:
        """
        Resumes after other code has run rounds from `state`.

        Args:
            context (`ContextSlots`): the slots of the draft's cache that hold the context now, for a single row.
            tokens, hidden_states, counts: arguments of `accept` for the last round.
        """
        num_fed = context.num_slots - self._slots.context.num_slots
        self._pending = []
        self._slots.context = context
        self._next_positions = self._next_positions + num_fed
        self._last_position += num_fed
        self.accept(tokens, hidden_states, counts)

    @torch.inference_mode()
    def reserve(self, context: ContextSlots, last_position: int, states: torch.Tensor) -> DraftRoom:
        """
        Makes room for the next tree.

        Args:
            context (`ContextSlots`): the slots of the draft's cache that hold the context.
            last_position (`int`): upper bound of the positions of all rows.
            states (`torch.Tensor`): a tensor with the device and dtype of the draft.
        """
        buffers = reserve(self.cache, self.num_slots)
        capacity = buffers[0][0].shape[2]
        # The draft may hold fewer slots than there are positions. A power of two, so that few shapes are compiled.
        num_positions = max(capacity, last_position + self.num_positions)
        num_positions = 1 << (num_positions - 1).bit_length()
        if len(self._rotations) != num_positions:
            self._rotations = rotary_table(self.draft.rotary_emb, num_positions, states)
        return DraftRoom(buffers, self._rotations, self._padding(context, capacity))

    def _padding(self, context: ContextSlots, num_slots: int) -> torch.Tensor | None:
        """Which of `num_slots` slots hold padding, `[B, num_slots]`; `None` without padding."""
        mask = context.padded_prompt_mask(num_slots, self.device)
        return None if mask is None else ~mask

    def draft_tree(
        self,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor,
        next_position: torch.Tensor,
        room: DraftRoom,
        image_vector: torch.Tensor | None = None,
        cuda_graphs: bool = True,
    ) -> CandidateTree:
        """
        Feeds the emitted tokens and grows trees from the last of them, on the device alone.

        Args:
            tokens, hidden_states, next_position, image_vector: as in [`FixedState`].
            lengths (`torch.LongTensor` of shape `[2, B]`): for each row, the number of its tokens, and the number of
                slots of its context.
            room (`DraftRoom`): the result of `reserve`.
            cuda_graphs (`bool`): argument of [`CompiledFunctions.run`].
        """
        settings = self.settings
        capacity = room.buffers[0][0].shape[2]
        shape = (len(tokens), capacity, len(room.rotations), room.padding is None, settings)
        given = self.draft.read_target(hidden_states)
        inputs = (tokens, given, lengths, next_position, room.padding, room.rotations, room.buffers, image_vector)
        tokens, parents, depths, ancestors, scores = self._compiled.run(
            _draft_tree, shape, tokens.device, self.draft, self._head, settings, *inputs, cuda_graphs=cuda_graphs
        )
        return CandidateTree(tokens, parents, depths, ancestors, settings.depth + 1, scores)


class _PlacedSlots:
    """The draft's cache inside compiled code: new slots go to given places, and attention gets the whole buffers.

    Args:
        buffers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer.
        places (`torch.LongTensor` of shape `[B, T]`): the slots that the T new keys and values of each row go to.
    """

    def __init__(self, buffers: Sequence[KeysAndValues], places: torch.Tensor):
        self.buffers = buffers
        self.places = places
        self.rows = torch.arange(len(places), device=places.device).unsqueeze(1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> KeysAndValues:
        keys, values = self.buffers[layer_idx]
        # A candidate may overflow. Masks hide its slot later, but attention still multiplies hidden values by 0, which
        # makes NaN of infinity.
        keys[self.rows, :, self.places] = key_states.transpose(1, 2).nan_to_num(0.0, 0.0, 0.0)
        values[self.rows, :, self.places] = value_states.transpose(1, 2).nan_to_num(0.0, 0.0, 0.0)
        return keys, values


def _draft_tree(
    draft: Draft,
    head: DraftHead,
    settings: TreeSettings,
    tokens: torch.Tensor,
    hidden_states: torch.Tensor,
    lengths: torch.Tensor,
    next_position: torch.Tensor,
    padding: torch.Tensor | None,
    rotations: torch.Tensor,
    buffers: Sequence[KeysAndValues],
    image_vector: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Does the work of `FixedDrafter.draft_tree`, and is compiled as a whole. Returns the tensors of the tree."""
    counts, held = lengths.unbind(0)
    num_tokens, device, dtype = tokens.shape[1], tokens.device, draft.dtype
    steps = torch.arange(max(num_tokens, settings.top_k), device=device)
    slots = torch.arange(buffers[0][0].shape[2], device=device)
    plain_forward = draft.plain_forward()

    def run(tokens, states, positions, mask, first):
        """Runs the draft over a few nodes. The nodes of each row take the slots from `first` (`[B]`) on."""
        embeds = head.target.embed(tokens).to(dtype)
        cos, sin = rotations[positions].unsqueeze(1).unbind(3)
        cache: Any = _PlacedSlots(buffers, first.unsqueeze(1) + steps[: tokens.shape[1]])
        live_slots = torch.stack([torch.zeros_like(first[0]), first[0] + tokens.shape[1]]).int()

        def attend(queries, keys, values, mask, scale):
            return split_attention(queries, keys, values, mask, scale, live_slots)

        return plain_forward(embeds, states, cos, sin, mask.unsqueeze(1), cache, attend, image_vector)

    # An accepted token sees the context, the tokens before it and itself.
    visible = slots <= (held.unsqueeze(1) + steps[:num_tokens]).unsqueeze(2)  # [B, A, S]
    if padding is not None:
        visible = visible & ~padding.unsqueeze(1)
    mask = additive_mask(visible, dtype)
    states = run(tokens, hidden_states, next_position + steps[:num_tokens], mask, held)
    last = (counts - 1).unsqueeze(1)  # the last token of each row
    roots = tokens.gather(1, last).squeeze(1)
    states = states.gather(1, last.unsqueeze(2).expand(-1, 1, states.shape[2]))
    mask = mask.gather(1, last.unsqueeze(2).expand(-1, 1, mask.shape[2]))
    next_position = next_position + counts.unsqueeze(1)
    first = held + counts
    growth = TreeGrowth(roots, settings)

    def forward(level, states):
        nonlocal mask, first
        width = growth.frontier_tokens.shape[1]
        own = slots == (first.unsqueeze(1) + steps[:width]).unsqueeze(2)  # [B, F, S]
        states, mask = rows_of(growth.above, width, states, mask)
        mask = torch.where(own, 0.0, mask)
        positions = (next_position + level).expand(-1, width)
        states = run(growth.frontier_tokens, states, positions, mask, first)
        first = first + width
        return states

    grow_levels(growth, states, TreePolicy(settings), head.compiled_top_k, forward)
    tree = growth.finish()
    if settings.top_k > 1:
        tree = tree.with_best_path_first()
    assert tree.scores is not None
    return tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.scores


__all__ = ["DraftRoom", "FixedDrafter", "FixedState"]
