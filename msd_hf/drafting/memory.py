"""What a draft keeps of a chat between calls of `generate` that share a cache."""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ..draft.interface import Draft
from ..kv.in_place import truncate


_ATTRIBUTE = "_msd_draft_memory"
_UNKNOWN = -1  # stands for a token of the target's cache whose id is not known


@dataclass
class DraftMemory:
    """
    The draft's side of a chat, carried by the target's cache. For one sequence without padding.

    Args:
        draft (`weakref.ref`): the draft that the memory belongs to.
        cache (`Cache`): the draft's cache, with one slot for each of `rows`.
        rows (`list[int]`): the draft's rows in the cache. Row j holds the token at position j + 1 and the target's
            hidden state at position j. Rows are missing where the draft joined the chat late, and where it reads
            fewer visual rows than there are.
        visual (`list[bool]`): which of `rows` are visual, the token at position j + 1 being one of an image.
        tokens (`list[int]`): the tokens of the P slots of the target's cache, and the token after them.
        last_hidden_state (`torch.Tensor` of shape `[1, 1, W]`): hidden state of the target at position P - 1.
        visual_embeds (`torch.Tensor` of shape `[1, E, H]`, *optional*): embeddings of the visual rows, for a draft
            with `image_vectors`; for one that compresses images, the vector that follows each of these rows.
    """

    draft: weakref.ref[Any]
    cache: Cache
    rows: list[int]
    visual: list[bool]
    tokens: list[int]
    last_hidden_state: torch.Tensor
    visual_embeds: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DraftMemory:
        cache = copy.deepcopy(self.cache, memo)
        rows, visual, tokens = list(self.rows), list(self.visual), list(self.tokens)
        embeds = None if self.visual_embeds is None else self.visual_embeds.clone()
        return DraftMemory(self.draft, cache, rows, visual, tokens, self.last_hidden_state.clone(), embeds)

    def __reduce__(self):  # a pickled cache keeps `None` in place of the memory
        return type(None), ()


class ChatMemory:
    """
    The memory of one call: what the draft still knows of earlier turns, and what it leaves to the next turn.

    Args:
        cache (`Cache`): the target's cache before the call; S slots are filled.
        draft (`Draft`): the draft.
        input_ids (`torch.LongTensor` of shape `[1, L]`): the whole chat, or the part that the cache lacks.
        num_slots (`int`): number of slots of the cache once the prompt is in it.

    Attributes:
        draft_cache (`Cache`, *optional*): the draft's cache, which holds `rows`.
        rows (`list[int]`): the draft's rows that are still valid.
        visual (`list[bool]`): which of them are visual.
        visual_embeds (`torch.Tensor` of shape `[1, E, H]`, *optional*): embeddings of the visual ones.
        hidden_state (`torch.Tensor` of shape `[1, 1, W]`, *optional*): hidden state of the target at position S - 1,
            if the draft has to be fed row S - 1 (again), because another token follows now.
    """

    def __init__(self, cache: Cache, draft: Draft, input_ids: torch.Tensor, num_slots: int):
        self.draft = draft
        self.draft_cache: Cache | None = None
        self.rows: list[int] = []
        self.visual: list[bool] = []
        self.visual_embeds: torch.Tensor | None = None
        self._fed: tuple[torch.Tensor, torch.Tensor]
        self._fed_embeds: torch.Tensor | None = None
        self.hidden_state: torch.Tensor | None = None
        num_past = cache.get_seq_length()
        memory = getattr(cache, _ATTRIBUTE, None)
        if memory is not None:
            delattr(cache, _ATTRIBUTE)
            if memory.draft() is not draft or num_past == 0 or not _fits(memory.cache, draft):
                memory = None
        self._tokens = input_ids[0].tolist()
        missing = num_slots - len(self._tokens)
        if missing:
            known = memory.tokens[:missing] if memory is not None else []
            self._tokens = [*known, *[_UNKNOWN] * (missing - len(known)), *self._tokens]
        if memory is not None:
            self._resume(memory, num_past)

    def _resume(self, memory: DraftMemory, num_past: int) -> None:
        common = next(
            (place for place, pair in enumerate(zip(memory.tokens, self._tokens, strict=False)) if pair[0] != pair[1]),
            min(len(memory.tokens), len(self._tokens)),
        )
        # Row j is valid if the token at j + 1 is the same and the hidden state at j belongs to this past.
        kept = bisect_left(memory.rows, min(common - 1, num_past))
        truncate(memory.cache, kept)
        self.draft_cache, self.rows, self.visual = memory.cache, memory.rows[:kept], memory.visual[:kept]
        if memory.visual_embeds is not None:
            self.visual_embeds = memory.visual_embeds[:, : sum(self.visual)]
        is_whole = num_past == len(memory.tokens) - 1
        if is_whole and (not self.rows or self.rows[-1] < num_past - 1):
            self.hidden_state = memory.last_hidden_state

    def keep(self, places: Sequence[int]) -> None:
        """Drops all rows that the draft holds but those at the given places of `rows`."""
        if self.draft_cache is not None and len(places) < len(self.rows):
            for layer in self.draft_cache.layers:
                layer.keep_slots(0, torch.tensor([places], device=layer.device))
        if self.visual_embeds is not None:
            left = set(places)
            held = [place for place, is_visual in enumerate(self.visual) if is_visual]
            self.visual_embeds = self.visual_embeds[:, [number for number, place in enumerate(held) if place in left]]
        self.rows, self.visual = [self.rows[place] for place in places], [self.visual[place] for place in places]

    def add(self, rows: torch.Tensor, visual: torch.Tensor, embeds: torch.Tensor | None = None) -> None:
        """Notes the rows of the prompt that the draft is fed `[L]`, which of them are visual `[L]`, and for a draft
        with `image_vectors` their embeddings `[1, L, H]`. They are read by `remember` alone: most calls leave nothing,
        and need not wait for the device."""
        self._fed, self._fed_embeds = (rows, visual), embeds

    def remember(self, cache: Cache, draft_cache: Cache, emitted: list[int], last_hidden_state: torch.Tensor) -> None:
        """
        Leaves on the target's cache what the draft knows after the call.

        Args:
            cache (`Cache`): the target's cache.
            draft_cache (`Cache`): the draft's cache.
            emitted (`list[int]`): the tokens of this call.
            last_hidden_state (`torch.Tensor` of shape `[1, 1, W]`): hidden state of the target at the last slot of its
                cache.
        """
        num_slots = cache.get_seq_length()
        fed_rows, fed_visual = (part.tolist() for part in self._fed)
        known = [*self.rows, *fed_rows]
        first_new = num_slots - (draft_cache.get_seq_length() - len(known))
        # A drafter may have taken the last row of the prompt back, to feed it again.
        rows = [*known, *range(first_new, num_slots)][: draft_cache.get_seq_length()]
        visual = [*self.visual, *fed_visual, *[False] * (len(rows) - len(known))][: len(rows)]
        embeds = self._fed_embeds
        if embeds is not None:
            embeds = embeds[:, self._fed[1]]
            if self.visual_embeds is not None:
                embeds = torch.cat([self.visual_embeds, embeds], dim=1)
        tokens = [*self._tokens, *emitted]
        memory = DraftMemory(
            weakref.ref(self.draft), draft_cache, rows, visual, tokens, last_hidden_state.clone(), embeds
        )
        setattr(cache, _ATTRIBUTE, memory)


def _fits(draft_cache: Cache, draft: Draft) -> bool:
    """Whether a draft can go on with its own cache: it may have been moved or cast in between."""
    keys = [layer.keys for layer in draft_cache.layers if layer.is_initialized]
    return all((part.dtype, part.device) == (draft.dtype, draft.device) for part in keys)


__all__ = ["ChatMemory", "DraftMemory"]
