"""What both drafters share: the interface, the pass over the prompt, and feeding accepted tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from ..attention.masks import additive_mask, chain_visibility, tree_attention_mask
from ..draft.interface import Draft
from ..kv.in_place import InPlaceLayer
from ..kv.slots import ContextSlots
from ..kv.transaction import CacheTransaction
from ..observer import phase
from ..target.adapter import TargetAdapter, TargetPrefill
from ..tree.candidate import CandidateTree
from ..tree.settings import TreeSettings
from .embedding import embedding_function, prompt_embeds
from .head import DraftHead
from .memory import ChatMemory
from .step import DraftingStep
from .visual_rows import keep_visual_rows, pooled


_LONGEST_KEPT = 64  # masks of chains up to this length are kept
_LEVELS_AHEAD = 16  # levels whose positions are made along with those of accepted tokens


@dataclass
class _Prompt:
    """The draft's pass over a prompt: its output at the last row `[B, 1, H]`, and the target's hidden states
    `[B, L, W]` that it read."""

    last_state: torch.Tensor
    hidden_states: torch.Tensor


class Drafter(ABC):
    """
    Proposes candidate trees and keeps the draft's KV cache.

    The cache holds one slot for each pair (token at position j + 1, target hidden state at position j). While a tree
    grows, the draft's own output stands in for hidden states that the target has not computed yet. Those slots are
    dropped when the tree is complete, and accepted tokens are fed again with the target's hidden states.

    Args:
        draft (`Draft`): the draft.
        target (`TargetAdapter`): lends its embedding and head.
        max_slots (`int`, *optional*): most slots of a cache buffer, see [`InPlaceLayer`].
        max_visual_rows (`int`, *optional*): most visual rows that the draft reads, of each row of the batch.

    Attributes:
        device (`torch.device`): the draft's device.
        cache (`Cache`): the draft's cache.
        last_hidden_state (`torch.Tensor` of shape `[1, 1, W]`): hidden state of the target at the last slot of its
            cache. Only for a single row.
    """

    last_hidden_state: torch.Tensor
    block_length: int | None = None  # `accept` needs rows padded to this number of tokens; `None`: any number

    def __init__(
        self,
        draft: Draft,
        target: TargetAdapter,
        max_slots: int | None = None,
        max_visual_rows: int | None = None,
    ):
        self.draft = draft
        self.max_visual_rows = max_visual_rows
        self.target = target
        self.cache = Cache(layers=[InPlaceLayer(max_slots) for _ in range(draft.num_cache_layers)])
        self._head = DraftHead(draft, target)
        self._drafting_step = DraftingStep(draft)
        # Kept, because a model searches its weights for device and dtype, which takes as long as a small operation.
        self.device, self._dtype = draft.device, draft.dtype
        self._reads_layers = draft.reads_layers  # if not, `read_target` returns its argument
        self._embedding = embedding_function(draft, target)  # `None`: other device or dtype
        self._own_masks: dict[tuple[str, int, int], torch.Tensor] = {}
        self._steps = torch.arange(_LONGEST_KEPT, device=self.device)
        self._unread: tuple[TargetPrefill, torch.Tensor, ChatMemory | None] | None = None  # arguments of `prefill`
        self._pending: list[tuple[torch.Tensor, torch.Tensor, Sequence[int]]] = []  # arguments of `accept`
        self._slots: CacheTransaction  # transaction over `cache`
        self._next_positions: torch.Tensor  # [B, P]: the next P positions of each row
        self._image_vector: torch.Tensor | None = None  # [B, 1, H], see `Draft.image_vectors`
        self._last_position = 0  # upper bound of the positions of all rows

    @abstractmethod
    def prefill(self, prefill: TargetPrefill, tokens: torch.Tensor, past: ChatMemory | None = None) -> None:
        """
        Feeds the prompt to the draft.

        Args:
            prefill (`TargetPrefill`): the target's pass over the prompt.
            tokens (`torch.LongTensor` of shape `[B]`): the tokens that the target chose after the prompt.
            past (`ChatMemory`, *optional*): what the draft knows from earlier turns.
        """

    def put_off(self, prefill: TargetPrefill, tokens: torch.Tensor, past: ChatMemory | None = None) -> None:
        """Takes the arguments of `prefill` for `read_prompt`: a draft that pauses may never need the prompt."""
        self._unread = prefill, tokens, past

    @property
    def awaits_prompt(self) -> bool:
        """Whether the prompt was put off and not read since. Nothing can be drafted before."""
        return self._unread is not None

    def read_prompt(self) -> None:
        """Feeds a prompt that was put off. Not in inference mode, because a cache that the user gets keeps it."""
        if self._unread is not None:
            arguments, self._unread = self._unread, None
            self.prefill(*arguments)

    def accept(self, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]) -> None:
        """
        Stores the tokens of a round, with the target's hidden states. The drafting of the next tree feeds them.

        Args:
            tokens (`torch.LongTensor` of shape `[B, A]`): the emitted tokens, the bonus token last, then padding.
            hidden_states (`torch.Tensor` of shape `[B, A, W]`): hidden states of the target at the position before
                each token.
            counts (`Sequence[int]`): number of tokens of each row.
        """
        self._pending.append((tokens, hidden_states, counts))

    @abstractmethod
    def propose(self, roots: torch.Tensor, limits: TreeSettings) -> CandidateTree:
        """
        Drafts a candidate tree for each row.

        Args:
            roots (`torch.LongTensor` of shape `[B]`): the last emitted tokens.
            limits (`TreeSettings`): bounds of this round's trees, of at least two nodes.
        """

    @abstractmethod
    def feed_pending(self) -> None:
        """Feeds the tokens that `accept` has stored, as the drafting of a next tree would."""

    def keep_rows(self, places: Sequence[int]) -> None:
        """Keeps only the rows at the given places of the batch, in that order."""
        self.read_prompt()
        self._slots.keep_rows(places)
        self._pending = [
            (tokens[list(places)], states[list(places)], [counts[place] for place in places])
            for tokens, states, counts in self._pending
        ]
        self._next_positions = self._next_positions[list(places)]
        if self._image_vector is not None:
            self._image_vector = self._image_vector[list(places)]

    def _prepare_cache(self) -> None:  # noqa: B027 (a drafter without preparation is complete)
        """Called before the prompt is fed into `cache`."""

    def _feed_prompt(self, prefill: TargetPrefill, tokens: torch.Tensor, past: ChatMemory | None) -> _Prompt:
        """Runs the draft over the prompt. Afterwards `_next_positions` begin with that of the first drafted node."""
        device = self.device
        inputs_embeds = prompt_embeds(self.draft, self.target, prefill, tokens)
        visual_mask = torch.cat([prefill.visual_mask, torch.zeros_like(prefill.visual_mask[:, :1])], dim=1)
        hidden_states = prefill.hidden_states
        if past is not None and past.hidden_state is not None:
            hidden_states = torch.cat([past.hidden_state.to(hidden_states), hidden_states], dim=1)
        else:
            inputs_embeds, visual_mask = inputs_embeds[:, 1:], visual_mask[:, 1:]
        batch_size, length = visual_mask.shape
        rows = torch.arange(prefill.num_slots - length, prefill.num_slots, device=device).expand(batch_size, -1)
        position_ids, prompt_mask = rows, prefill.prompt_mask
        if prompt_mask is not None:
            prompt_mask = prompt_mask.to(device)
            position_ids = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            prompt_mask = prompt_mask[:, -length:]
        policy = self.draft.visual_positions
        # The row before a text that begins with an image is padding.
        runs = visual_mask if prompt_mask is None else visual_mask & prompt_mask.bool().to(visual_mask.device)
        if policy == "pooled":
            inputs_embeds, hidden_states = (pooled(part, runs) for part in (inputs_embeds, hidden_states))
        inputs_embeds, vectors = self._compressed(inputs_embeds, runs, past)
        if self.max_visual_rows is not None or policy in ("pooled", "dropped", "compressed"):
            held = () if past is None else past.visual
            per_image = self.draft.rows_per_image
            choice = keep_visual_rows(visual_mask, prompt_mask, self.max_visual_rows, held, policy, per_image)
            if choice is not None:
                kept, held_rows = choice
                inputs_embeds, hidden_states = kept.of(inputs_embeds), kept.of(hidden_states)
                visual_mask, position_ids, rows = kept.of(visual_mask), kept.of(position_ids), kept.of(rows)
                prompt_mask, length = kept.mask, visual_mask.shape[1]
                vectors = None if vectors is None else kept.of(vectors)
                if past is not None:
                    past.keep(held_rows)
        inputs_embeds, visual_mask = self._to_draft(inputs_embeds), visual_mask.to(device)
        noted = inputs_embeds if vectors is None else vectors
        if policy != "compressed":
            # Padding may be copies of visual rows.
            pooled_mask = visual_mask if prompt_mask is None else visual_mask & prompt_mask.bool()
            held_embeds = None if past is None else past.visual_embeds
            vectors = self.draft.image_vectors(inputs_embeds, pooled_mask, held_embeds)
        if vectors is not None:
            self._image_vector = vectors[:, -1:].clone()
        num_held = 0
        if past is not None:
            if past.draft_cache is not None:
                self.cache, num_held = past.draft_cache, len(past.rows)
            past.add(rows[0], visual_mask[0], None if vectors is None else noted)
        self._prepare_cache()
        self._slots = CacheTransaction(self.cache, ContextSlots([num_held] * batch_size))
        mask = prompt_mask
        if num_held:  # a mask of ones for the new rows alone would hide the slots that are held
            visible = chain_visibility(length, device).expand(batch_size, -1, -1)
            mask = tree_attention_mask(visible, self._slots.context, self._dtype)
        self._slots.begin()
        with phase("draft forward"):
            last_state = self.draft(
                inputs_embeds=inputs_embeds,
                hidden_states=self.draft.read_target(self._to_draft(hidden_states)),
                visual_mask=visual_mask,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=self.cache,
                last_row_only=True,
                **({} if vectors is None else {"image_vectors": vectors}),
            ).last_hidden_state
        self._slots.commit_prompt(prompt_mask)
        self._next_positions = position_ids[:, -1:] + 1
        self._last_position = prefill.num_slots
        return _Prompt(last_state, hidden_states)

    def _compressed(
        self, inputs_embeds: torch.Tensor, runs: torch.Tensor, past: ChatMemory | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result of `Draft.compress_images`, for a draft that compresses images; else the embeddings."""
        if self.draft.visual_positions != "compressed":
            return inputs_embeds, None
        held = None if past is None or past.visual_embeds is None else past.visual_embeds[:, -1:]
        if held is not None and held.shape[1] == 0:
            held = None
        return self.draft.compress_images(self._to_draft(inputs_embeds), runs, held)

    def _feed(self, tokens: torch.Tensor, hidden_states: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """
        Feeds accepted tokens. The arguments are those of `accept`.

        Returns:
            The draft's output at the last token of each row, `[B, 1, H]`.
        """
        length = tokens.shape[1]
        positions = self._positions_ahead(length + _LEVELS_AHEAD)
        context = self._slots.context
        # A single token after a context that every row sees whole needs no mask.
        mask = self._chain_mask(length) if length > 1 or context.hides_slots else None
        self._last_position += length
        given = self._to_draft(hidden_states)
        if self._reads_layers:
            given = self.draft.read_target(given)
        self._slots.begin()
        states = self._step(tokens, given, positions.narrow(1, 0, length), mask, self._last_position)
        with phase("cache"):
            self._slots.commit(counts)
        if min(counts) == length:
            self._next_positions = positions.narrow(1, length, _LEVELS_AHEAD)
            self.last_hidden_state = hidden_states.narrow(1, length - 1, 1)
            return states.narrow(1, length - 1, 1)
        last = torch.tensor(counts, device=self.device).unsqueeze(1)  # [B, 1]
        self._next_positions = self._next_positions + last
        return states.gather(1, (last - 1).unsqueeze(2).expand(-1, -1, states.shape[2]))

    def _step(
        self,
        tokens: torch.Tensor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        last_position: int,
        rotations: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Runs the draft over a few tokens `[B, T]`, which get slots in the cache. `hidden_states` and the result have
        the shape `[B, T, H]`. `rotations`: see [`DraftingStep`]."""
        with phase("draft forward"):
            if self._embedding is not None:
                embeds = self._embedding(tokens)
            else:
                embeds = self._to_draft(self.target.embed(tokens))
            return self._drafting_step(
                embeds,
                hidden_states,
                position_ids,
                attention_mask,
                self.cache,
                last_position,
                self._image_vector,
                rotations,
            )

    def _positions_ahead(self, count: int) -> torch.Tensor:
        """The next positions of each row, `[B, count]`."""
        if count > self._next_positions.shape[1]:
            if count > self._steps.shape[0]:
                self._steps = torch.arange(count, device=self.device)
            self._next_positions = self._next_positions.narrow(1, 0, 1) + self._steps.narrow(0, 0, count)
        return self._next_positions.narrow(1, 0, count)

    def _chain_mask(self, length: int) -> torch.Tensor:
        """The additive mask of a chain of `length` nodes behind the context, `[B, 1, length, S + length]`."""
        context = self._slots.context
        batch_size = len(context.lengths)
        if length <= _LONGEST_KEPT and not context.hides_slots:
            own = self._own_mask("chain", batch_size, length)
            return torch.cat([own.new_zeros(batch_size, length, context.num_slots), own], dim=2).unsqueeze(1)
        visible = chain_visibility(length, self.device).expand(batch_size, -1, -1)
        return tree_attention_mask(visible, context, self._dtype)

    def _own_mask(self, kind: str, batch_size: int, size: int) -> torch.Tensor:
        """An additive mask `[B, size, size]` of nodes over themselves: the nodes of a `"level"` see only themselves,
        those of a `"chain"` also the nodes before. Kept, because it is needed again and again."""
        mask = self._own_masks.get((kind, batch_size, size))
        if mask is None:
            visible = chain_visibility(size, self.device)
            if kind == "level":
                visible = visible & visible.T
            mask = additive_mask(visible, self._dtype).expand(batch_size, -1, -1)
            self._own_masks[kind, batch_size, size] = mask
        return mask

    def _to_draft(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(device=self.device, dtype=self._dtype)


__all__ = ["Drafter"]
