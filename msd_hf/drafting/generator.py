"""Drafting: the draft model grows a candidate tree from the target's last hidden states (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional
from transformers import Cache

from ..attention.masks import tree_attention_mask
from ..draft.modeling_msd import MSDDraftModel
from ..kv.fixed import make_static
from ..kv.in_place import InPlaceLayer, keep_paths, select_rows, truncate
from ..kv.slots import ContextSlots
from ..phases import phase
from ..target.adapter import TargetAdapter, TargetPrefill
from ..tree.candidate import CandidateTree
from ..tree.growth import TreeGrowth, TreeTables, rows_of
from ..tree.policy import TreePolicy
from ..tree.settings import TreeSettings
from .fixed import StaticDrafting
from .head import DraftHead
from .memory import Conversation
from .plain_modules import function_at
from .step import DraftingStep


_LONGEST_KEPT = 64  # masks of that many tokens are kept
_LEVELS_AHEAD = 16  # of which the positions are made along with those of accepted tokens


@dataclass
class DraftingState:
    """
    Where a draft stands between two rounds.

    Args:
        static (`StaticDrafting`): how it drafts.
        tokens (`torch.LongTensor` of shape `[B, A]`): to be fed next, then anything.
        hidden_states (`torch.Tensor` of shape `[B, A, (1 + K) * H]`): the target's, at the position before each.
        counts (`list[int]`): how many tokens each row has.
        next_position (`torch.LongTensor` of shape `[B, 1]`): of the first of them.
        last_position (`int`): no row is beyond it.
        context (`ContextSlots`): what the cache holds.
    """

    static: StaticDrafting
    tokens: torch.Tensor
    hidden_states: torch.Tensor
    counts: list[int]
    next_position: torch.Tensor
    last_position: int
    context: ContextSlots


class MSDCandidateGenerator:
    """
    Proposes candidate trees and keeps the draft's KV cache.

    The cache holds one slot per pair (token at position j + 1, target hidden state at position j). While a tree grows,
    the draft's own output stands in for hidden states that the target has not computed yet; those slots are dropped
    with its end, and the accepted tokens fed again with the target's.

    Args:
        draft (`MSDDraftModel`): the draft.
        target (`TargetAdapter`): lends its embedding and head.
        max_slots (`int`, *optional*): bound of what is allocated ahead, see [`InPlaceLayer`].
        static_settings (`TreeSettings`, *optional*): draft trees of this size with fixed shapes, see
            [`StaticDrafting`]. A draft that is not plain is not compiled.
    """

    def __init__(
        self,
        draft: MSDDraftModel,
        target: TargetAdapter,
        max_slots: int | None = None,
        static_settings: TreeSettings | None = None,
    ):
        self.draft = draft
        self.target = target
        self._head = DraftHead(draft, target)
        self._drafting_step = DraftingStep(draft)
        self._static: StaticDrafting | None = None
        if static_settings is not None and static_settings.num_nodes > 1 and self._drafting_step.is_plain:
            self._static = StaticDrafting(self._head, static_settings)
        self.cache = Cache(layers=[InPlaceLayer(max_slots) for _ in draft.layers])
        # A model looks for them among its weights each time, which takes as long as an operation.
        self._device, self._dtype = draft.device, draft.dtype
        self._embed = function_at(target.embedding, draft) or self._embed_elsewhere
        self._own_masks: dict[tuple[str, int, int], torch.Tensor] = {}
        self._tables: TreeTables | None = None
        self._steps = torch.arange(_LONGEST_KEPT, device=self._device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor, Sequence[int]]] = []  # what `accept` takes
        self._context: ContextSlots  # accepted rows; drafted ones come behind
        self._next_positions: torch.Tensor  # [B, P]: the next one, and P - 1 behind it
        self._last_position = 0  # no row is beyond it
        self._last_state: torch.Tensor  # [B, 1, H], from which the first level of the next tree is drafted
        self.last_hidden_state: torch.Tensor  # [1, 1, (1 + K) * H]: of a single row, the target's at its last slot

    def prefill(self, prefill: TargetPrefill, tokens: torch.Tensor, past: Conversation | None = None) -> None:
        """
        Feeds the prompt.

        Args:
            prefill (`TargetPrefill`): what the target saw and gave.
            tokens (`torch.LongTensor` of shape `[B]`): the first ones that the target chose after it.
            past (`Conversation`, *optional*): goes on where an earlier call ended.
        """
        device = self._device
        token_embeds = self.target.embed(tokens.unsqueeze(1)).to(prefill.inputs_embeds)
        inputs_embeds = torch.cat([prefill.inputs_embeds, token_embeds], dim=1)
        visual_mask = torch.cat([prefill.visual_mask, torch.zeros_like(prefill.visual_mask[:, :1])], dim=1)
        hidden_states = prefill.hidden_states
        num_held = 0
        if past is not None and past.draft_cache is not None:
            self.cache, num_held = past.draft_cache, len(past.rows)
        if self._static is not None:
            make_static(self.cache, self.draft, len(self.draft.layers))
        if past is not None and past.hidden_state is not None:
            hidden_states = torch.cat([past.hidden_state.to(hidden_states), hidden_states], dim=1)
        else:
            inputs_embeds, visual_mask = inputs_embeds[:, 1:], visual_mask[:, 1:]
        batch_size, length = visual_mask.shape
        prompt_mask = prefill.prompt_mask
        if prompt_mask is None:
            end = prefill.num_slots
            position_ids = torch.arange(end - length, end, device=device).expand(batch_size, -1)
        else:
            prompt_mask = prompt_mask.to(device)
            position_ids = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            prompt_mask = prompt_mask[:, -length:]
        self._next_positions = position_ids[:, -1:] + 1
        self._context = ContextSlots([num_held] * batch_size)
        # Behind what is held already, a mask of ones for the new rows alone would not do.
        mask = self._chain_mask(length) if num_held else prompt_mask
        with phase("draft forward"):
            states = self.draft(
                inputs_embeds=self._to_draft(inputs_embeds),
                hidden_states=self._to_draft(hidden_states),
                visual_mask=visual_mask.to(device),
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=self.cache,
            ).last_hidden_state
        self._last_position = prefill.num_slots
        self._context = ContextSlots([num_held + length] * batch_size, prompt_mask)
        # Copies: a view would keep the states of the whole prompt.
        self._last_state = states[:, -1:].clone()
        self.last_hidden_state = hidden_states[:, -1:].clone()
        if self._static is not None:
            # The last row again, as the first one that was accepted: the first round is like all others then.
            self._next_positions = self._next_positions - 1
            mask = None if prompt_mask is None else prompt_mask[:, :-1]
            self._context = ContextSlots([num_held + length - 1] * batch_size, mask)
            missing = self._static.max_tokens - 1
            row = functional.pad(tokens.unsqueeze(1).to(device), (0, missing))
            states = functional.pad(self.last_hidden_state, (0, 0, 0, missing))
            self._pending = [(row, states, [1] * batch_size)]
            truncate(self.cache, self._context.num_slots)

    @property
    def static_tokens(self) -> int | None:
        """To how many tokens `accept` wants rows to be padded, if to a fixed number."""
        return None if self._static is None else self._static.max_tokens

    def accept(self, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]) -> None:
        """
        Takes the tokens that were emitted, with the target's true hidden states. They are fed once they are needed.

        Args:
            tokens (`torch.LongTensor` of shape `[B, A]`): the emitted tokens, the bonus token last; then anything.
            hidden_states (`torch.Tensor` of shape `[B, A, (1 + K) * H]`): the target's, at the position before each.
            counts (`Sequence[int]`): how many tokens each row has.
        """
        self._pending.append((tokens, hidden_states, counts))
        if self._static is not None and len(counts) == 1:
            self.last_hidden_state = hidden_states[:, counts[0] - 1 : counts[0]]

    def hand_over(self) -> DraftingState:
        """What somebody else goes on from, where drafting is static."""
        assert self._static is not None
        ((tokens, hidden_states, counts),) = self._pending
        return DraftingState(
            self._static,
            tokens,
            self._to_draft(hidden_states),
            list(counts),
            self._positions_ahead(1),
            self._last_position,
            replace(self._context),
        )

    def take_back(
        self, context: ContextSlots, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]
    ) -> None:
        """
        Goes on behind what somebody else has drafted.

        Args:
            context (`ContextSlots`): what the cache holds now, for a single row.
            tokens, hidden_states, counts: see `accept`; of the last round.
        """
        num_fed = context.num_slots - self._context.num_slots
        self._pending = []
        self._context = context
        self._next_positions = self._next_positions + num_fed
        self._last_position += num_fed
        self.accept(tokens, hidden_states, counts)

    @torch.inference_mode()  # as for `propose`
    def feed_pending(self) -> None:
        """Feeds the tokens that were accepted, as the next drafting would."""
        self._feed_pending()

    def _feed_pending(self) -> None:
        pending, self._pending = self._pending, []
        if len(pending) > 1 and all(min(counts) == tokens.shape[1] for tokens, _, counts in pending):
            tokens = torch.cat([tokens for tokens, _, _ in pending], dim=1)
            hidden_states = torch.cat([states for _, states, _ in pending], dim=1)
            pending = [(tokens, hidden_states, [tokens.shape[1]] * tokens.shape[0])]
        for tokens, hidden_states, counts in pending:
            length = max(counts)
            self._feed(tokens.narrow(1, 0, length), hidden_states.narrow(1, 0, length), counts)

    def _feed(self, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]) -> None:
        length = tokens.shape[1]
        positions = self._positions_ahead(length + _LEVELS_AHEAD)
        # One row after rows that are all seen needs no mask.
        needs_mask = length > 1 or self._context.is_ragged or self._context.prompt_mask is not None
        mask = self._chain_mask(length) if needs_mask else None
        self._last_position += length
        states = self._step(tokens, hidden_states, positions.narrow(1, 0, length), mask, self._last_position)
        with phase("cache"):
            keep_paths(self.cache, self._context, None, counts)
        if min(counts) == length:
            self._next_positions = positions.narrow(1, length, _LEVELS_AHEAD)
            self._last_state = states.narrow(1, length - 1, 1)
            self.last_hidden_state = hidden_states.narrow(1, length - 1, 1)
        else:
            last = torch.tensor(counts, device=self._device).unsqueeze(1)  # [B, 1]
            self._next_positions = self._next_positions + last
            self._last_state = states.gather(1, (last - 1).unsqueeze(2).expand(-1, -1, states.shape[2]))

    def keep_rows(self, places: Sequence[int]) -> None:
        """Goes on with some rows of the batch alone."""
        self._context = select_rows(self.cache, self._context, places)
        self._pending = [
            (tokens[list(places)], states[list(places)], [counts[place] for place in places])
            for tokens, states, counts in self._pending
        ]
        self._next_positions = self._next_positions[list(places)]
        self._last_state = self._last_state[list(places)]

    @torch.inference_mode()  # in which many small operations take an eighth less time
    def propose(
        self,
        roots: torch.Tensor,
        settings: TreeSettings,
        policy: TreePolicy | None = None,
        best_path_first: bool = False,
    ) -> CandidateTree:
        """
        Grows trees.

        Args:
            roots (`torch.LongTensor` of shape `[B]`): the last emitted tokens.
            settings (`TreeSettings`): bounds of the trees.
            policy (`TreePolicy`, *optional*): chooses how wide and deep they become within these, and how many nodes
                are kept in the end.
            best_path_first (`bool`): see [`CandidateTree.with_best_path_first`].
        """
        if settings.num_nodes == 1:
            return CandidateTree.bare(roots)
        if self._static is not None:
            return self._propose_static(self._static)
        policy = policy or TreePolicy(settings)
        growth = TreeGrowth(roots, settings, self._tables)
        self._feed_pending()
        batch_size, dtype = roots.shape[0], self._dtype
        states = self._last_state
        growth.expand(*self._head.top_k(states, settings.top_k))
        # Which slots each node of the frontier sees, [B, F, S + nodes that were expanded before]: its parent's and its
        # own. A path sees all.
        mask = None
        if self._context.hides_slots:
            nothing = torch.ones(batch_size, 1, 0, dtype=torch.bool, device=states.device)
            mask = tree_attention_mask(nothing, self._context, dtype)[:, 0]
        positions = self._positions_ahead(settings.depth).split(1, dim=1)
        own = self._own_mask("nodes", batch_size, settings.top_k)
        for level in range(settings.depth):
            width = policy.width(growth)
            if width == 0:
                break
            if width < settings.top_k:
                growth.narrow(width)
            tokens, above = growth.frontier_tokens, growth.above
            width = tokens.shape[1]  # a small vocabulary has fewer candidates
            if mask is None and width > 1:
                mask = states.new_zeros(batch_size, 1, self._context.num_slots + level)
            seen = None
            if mask is not None:
                states, mask = rows_of(above, width, states, mask)
                if own.shape[1] != width:
                    own = self._own_mask("nodes", batch_size, width)
                mask = torch.cat([mask, own], dim=2)
                seen = mask.unsqueeze(1)
            last_position = self._last_position + level + 1
            states = self._step(tokens, states, positions[level], seen, last_position)
            growth.expand(*self._head.top_k(states, settings.top_k))
        self._tables = growth.tables
        with phase("cache"):
            truncate(self.cache, self._context.num_slots)
        tree = growth.finish(policy.num_nodes(growth))
        return tree.with_best_path_first() if best_path_first and settings.top_k > 1 and tree.max_depth else tree

    def _propose_static(self, static: StaticDrafting) -> CandidateTree:
        ((tokens, hidden_states, counts),) = self._pending
        self._pending = []
        states = self._to_draft(hidden_states)
        position = self._positions_ahead(1)
        # Before the host goes ahead of the device: a tensor that is made of a list waits for it.
        self._next_positions = position + torch.tensor(counts, device=states.device).unsqueeze(1)
        tree = static.propose(tokens, states, counts, position, self._last_position, self._context, self.cache)
        self._last_position += max(counts)
        return tree

    def _positions_ahead(self, count: int) -> torch.Tensor:
        """The next positions of each row, `[B, count]`."""
        if count > self._next_positions.shape[1]:
            if count > self._steps.shape[0]:
                self._steps = torch.arange(count, device=self._device)
            self._next_positions = self._next_positions.narrow(1, 0, 1) + self._steps.narrow(0, 0, count)
        return self._next_positions.narrow(1, 0, count)

    def _own_mask(self, kind: str, batch_size: int, size: int) -> torch.Tensor:
        """An additive mask `[B, size, size]`: `"nodes"` of a level see themselves alone, those of a `"chain"` also the
        ones before. Kept, since they are needed time and again."""
        mask = self._own_masks.get((kind, batch_size, size))
        if mask is None:
            mask = torch.full((size, size), torch.finfo(self._dtype).min, dtype=self._dtype, device=self._device)
            mask = mask.fill_diagonal_(0.0) if kind == "nodes" else mask.triu_(1)
            mask = self._own_masks[kind, batch_size, size] = mask.expand(batch_size, -1, -1)
        return mask

    def _chain_mask(self, length: int) -> torch.Tensor:
        """The mask of `length` rows that follow each other behind the context."""
        batch_size = self._next_positions.shape[0]
        if length <= _LONGEST_KEPT and not self._context.hides_slots:
            own = self._own_mask("chain", batch_size, length)
            return torch.cat([own.new_zeros(batch_size, length, self._context.num_slots), own], dim=2).unsqueeze(1)
        chain = torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
        return tree_attention_mask(chain.expand(batch_size, -1, -1), self._context, self._dtype)

    def _step(self, tokens, hidden_states, position_ids, attention_mask, last_position: int) -> torch.Tensor:
        """The draft's states after a few tokens `[B, T]`, which get slots."""
        with phase("draft forward"):
            return self._drafting_step(
                self._embed(tokens),
                self._to_draft(hidden_states),
                position_ids,
                attention_mask,
                self.cache,
                last_position,
            )

    def _embed_elsewhere(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._to_draft(self.target.embed(tokens))

    def _to_draft(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(device=self._device, dtype=self._dtype)


__all__ = ["MSDCandidateGenerator"]
