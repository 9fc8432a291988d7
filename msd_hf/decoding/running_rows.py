"""The rows of a batch that are still running, and what is kept of those that have ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Cache

from ..kv.in_place import keep_paths, put_rows, select_rows, take_row, truncate
from ..kv.slots import ContextSlots
from ..target.adapter import TargetAdapter
from ..tree.candidate import CandidateTree
from .batch_selection import BatchSelector
from .decoder_outputs import DecoderOutputs
from .verification import Verification


@dataclass
class _EndedRow:
    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    length: int
    next_position: torch.Tensor  # [..., 1, 1]
    last_token: int


class RunningRows:
    """
    Where the target stands in each running row: slots, position, last token. Slots and position are behind by what was
    accepted last until `settle` is called.

    Args:
        cache (`Cache`): the target's, of `InPlaceLayer`s.
        prompt_mask (`torch.BoolTensor` of shape `[B, S]`, *optional*): false at padding.
        next_position (`torch.LongTensor` of shape `[..., B, 1]`): of the last token.
        tokens (`list[int]`): the last token of each row, which is not in the cache yet.
    """

    def __init__(self, cache: Cache, prompt_mask: torch.Tensor | None, next_position: torch.Tensor, tokens: list[int]):
        self.cache = cache
        self.context = ContextSlots([cache.get_seq_length()] * len(tokens), prompt_mask)
        self.next_position = next_position
        self.tokens = tokens
        self._prompt_mask = prompt_mask
        self._ended: dict[int, _EndedRow] = {}
        self._unsettled: tuple[Verification, torch.Tensor, torch.Tensor] | None = None

    def accept(self, verified: Verification, paths: torch.Tensor) -> None:
        """Takes note of accepted nodes (`paths`, `[B, A]`): `tokens` at once, the rest in `settle`."""
        # At once, while no drafting is under way: a tensor that is made of a list waits for the device.
        counts = torch.tensor(verified.counts, device=self.next_position.device)
        self._unsettled = verified, paths, counts
        self.tokens = [tokens[-1] for tokens in verified.tokens]

    def settle(self) -> None:
        """Brings context, cache and position up to what was accepted. Apart from `accept`, since drafting need not
        wait for it: a GPU has something to do in the meantime."""
        if self._unsettled is not None:
            verified, paths, counts = self._unsettled
            self._unsettled = None
            in_place = all(path[-1] == len(path) - 1 for path in verified.paths)
            keep_paths(self.cache, self.context, None if in_place else paths, verified.counts)
            self.next_position = self.next_position + counts.unsqueeze(1)

    @contextmanager
    def cut_back_on_error(self, selector: BatchSelector) -> Iterator[None]:
        """
        Leaves the cache of an interrupted call (a streamer raised, say) with all rows, and with slots that are sure to
        belong to tokens that were handed on, those of the context: a cache of the user's own can be used again then.
        """
        try:
            yield
        except BaseException:
            lengths = [*self.context.lengths, *(row.length for row in self._ended.values())]
            truncate(self.cache, min(lengths))
            if self._ended:
                for place, row in enumerate(selector.running):
                    self._ended[row] = self._take(place)
                put_rows(self.cache, [self._ended[row].keys_and_values for row in range(selector.batch_size)])
                truncate(self.cache, min(lengths))
            raise

    def select(self, places: Sequence[int], rows: Sequence[int], keep_others: bool) -> None:
        """
        Goes on with some rows alone.

        Args:
            places (`Sequence[int]`): where they are among the running ones.
            rows (`Sequence[int]`): which rows of the whole batch the running ones were up to now.
            keep_others (`bool`): put the slots of the others aside for `complete`.
        """
        self.settle()
        for place in sorted(set(range(len(rows))) - set(places)):
            if keep_others:
                self._ended[rows[place]] = self._take(place)
        self.context = select_rows(self.cache, self.context, places)
        self.next_position = self.next_position[..., list(places), :]
        self.tokens = [self.tokens[place] for place in places]

    def complete(
        self, adapter: TargetAdapter, selector: BatchSelector, extras: DecoderOutputs, flags: dict[str, bool]
    ) -> None:
        """
        Puts rows that were taken out of the batch back into the cache, and brings those that ended early to the length
        of the longest, as `generate` does with padding, by one forward of the target: for the cache, scores and states
        that are returned.
        """
        self.settle()
        batch_size = selector.batch_size
        emitted = [len(selector.row_tokens(row)) for row in range(batch_size)]
        missing = [max(emitted) - count for count in emitted]
        if not self._ended and not any(missing):
            return
        for place, row in enumerate(selector.running):
            self._ended[row] = self._take(place)
        ended = [self._ended[row] for row in range(batch_size)]
        put_rows(self.cache, [row.keys_and_values for row in ended])
        if not any(missing):
            return
        context = ContextSlots([row.length for row in ended], self._prompt_mask)
        next_position = torch.cat([row.next_position for row in ended], dim=-2)
        device = next_position.device
        tokens = torch.full((batch_size, max(missing)), selector.pad_token_id, device=device)
        tokens[:, 0] = torch.tensor([row.last_token for row in ended], device=device)
        chain = CandidateTree.chain(tokens)
        verification = adapter.verify(chain, self.cache, context, next_position, **flags)
        paths = [list(range(count)) for count in missing]
        extras.add(verification.outputs, range(batch_size), paths, context.lengths)
        for row, count in enumerate(missing):
            selector.pad(row, verification.logits[row, :count])
        keep_paths(self.cache, context, None, missing)

    def _take(self, place: int) -> _EndedRow:
        length = self.context.lengths[place]
        return _EndedRow(
            take_row(self.cache, place, length),
            length,
            self.next_position[..., place : place + 1, :],
            self.tokens[place],
        )


__all__ = ["RunningRows"]
