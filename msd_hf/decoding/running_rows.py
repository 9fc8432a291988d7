"""Where the target stands in each running row of a batch: committed slots, position, last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kv.slots import ContextSlots
from ..kv.transaction import CacheTransaction
from ..target.adapter import TargetAdapter
from ..tree.candidate import CandidateTree
from .batch_selection import BatchSelector
from .decoder_outputs import DecoderOutputs
from .verification import Verification


class RunningRows:
    """
    Keeps the committed slots, the position and the last token of each running row. After `accept`, slots and positions
    lag behind until `settle` is called.

    Args:
        slots (`CacheTransaction`): the transaction over the target's cache, with the prompt committed.
        next_position (`torch.LongTensor` of shape `[..., B, 1]`): position of the last token of each row.
        tokens (`list[int]`): the last token of each row, which is not in the cache yet.
    """

    def __init__(self, slots: CacheTransaction, next_position: torch.Tensor, tokens: list[int]):
        self.slots = slots
        self.next_position = next_position
        self.tokens = tokens
        self._ended: dict[int, tuple[torch.Tensor, int]] = {}  # next position [..., 1, 1] and last token, by row
        self._unsettled: tuple[Verification, torch.Tensor, torch.Tensor] | None = None

    @property
    def context(self) -> ContextSlots:
        """The committed slots."""
        return self.slots.context

    def accept(self, verified: Verification, paths: torch.Tensor) -> None:
        """Takes the outcome of a verification, with the accepted nodes `paths` `[B, A]`. `tokens` change at once,
        slots and positions in `settle`."""
        # Made before the next drafting begins, because making a tensor from a list waits for the device.
        counts = torch.tensor(verified.counts, device=self.next_position.device)
        self._unsettled = verified, paths, counts
        self.tokens = [tokens[-1] for tokens in verified.tokens]

    def settle(self) -> None:
        """Commits the accepted slots and moves the positions. This is not part of `accept`, so that the next drafting
        can begin first and a GPU has work in the meantime."""
        if self._unsettled is not None:
            verified, paths, counts = self._unsettled
            self._unsettled = None
            in_place = all(path[-1] == len(path) - 1 for path in verified.paths)
            self.slots.commit(verified.counts, None if in_place else paths, counts)
            self.next_position = self.next_position + counts.unsqueeze(1)

    def select(self, places: Sequence[int], keep_others: bool) -> None:
        """
        Keeps only the given rows.

        Args:
            places (`Sequence[int]`): places of these rows among the running rows.
            keep_others (`bool`): store the slots of the other rows for `complete`.
        """
        self.settle()
        if keep_others:
            for place in set(range(len(self.tokens))) - set(places):
                self._note_end(place)
        self.slots.keep_rows(places, store_others=keep_others)
        self.next_position = self.next_position[..., list(places), :]
        self.tokens = [self.tokens[place] for place in places]

    def complete(
        self, adapter: TargetAdapter, selector: BatchSelector, extras: DecoderOutputs, flags: dict[str, bool]
    ) -> None:
        """
        Puts stored rows back into the cache, and brings rows that ended early to the length of the longest row.
        `generate` alone runs the target over the padding of such rows step by step. Here one forward over all padding
        gives the cache, scores and states that are returned.
        """
        self.settle()
        batch_size = selector.batch_size
        emitted = [len(selector.row_tokens(row)) for row in range(batch_size)]
        missing = [max(emitted) - count for count in emitted]
        if not self._ended and not any(missing):
            return
        for place in range(len(self.tokens)):
            self._note_end(place)
        self.slots.restore_rows()
        if not any(missing):
            return
        ended = [self._ended[row] for row in range(batch_size)]
        next_position = torch.cat([position for position, _ in ended], dim=-2)
        device = next_position.device
        tokens = torch.full((batch_size, max(missing)), selector.pad_token_id, device=device)
        tokens[:, 0] = torch.tensor([token for _, token in ended], device=device)
        context_lengths = self.context.lengths
        self.slots.begin()
        verification = adapter.verify(
            CandidateTree.chain(tokens), self.slots.cache, self.context, next_position, **flags
        )
        paths = [list(range(count)) for count in missing]
        extras.add(verification.outputs, range(batch_size), paths, context_lengths)
        for row, count in enumerate(missing):
            selector.pad(row, verification.logits[row, :count])
        self.slots.commit(missing)

    def _note_end(self, place: int) -> None:
        self._ended[self.slots.rows[place]] = self.next_position[..., place : place + 1, :], self.tokens[place]


__all__ = ["RunningRows"]
