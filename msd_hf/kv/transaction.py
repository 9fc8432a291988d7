"""All layers of a KV cache as one: a forward appends a block of slots, which is then kept in part or dropped.

Another kind of layer is added here, in `can_commit` and `make_in_place`. It needs the methods of `InPlaceLayer` that
this module calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..compat import holds_nothing
from ..errors import MSDUnsupportedError
from ..recurrent.layer import RecurrentLayer, copy_states
from .hybrid import HybridLayer
from .image_states import ImageStatesLayer, image_states
from .in_place import InPlaceLayer, in_place, own_layers, take_content, truncate
from .indexed import BLOCK_INDEXED, has_index, indexed_in_place
from .reference_window import REFERENCE_WINDOW, ReferenceWindowLayer, reference_window
from .slots import ContextSlots


# Kinds of cache layers that are served; later releases have more of them.
_SERVED = {DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer} | {
    getattr(cache_utils, name, None)
    for name in (
        "DynamicIndexedLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )
}


# Kinds whose classes stand in the files of their models, as transformers names them.
_SERVED_KINDS = {REFERENCE_WINDOW, BLOCK_INDEXED}


def can_commit(layer: Any) -> bool:
    """Whether `make_in_place` can serve a layer of this kind."""
    # A subclass may hold more than keys, values and states, so that only known ones are served.
    is_ours = isinstance(layer, (InPlaceLayer, RecurrentLayer, ImageStatesLayer))
    is_served = type(layer) in _SERVED or getattr(type(layer), "_layer_type", None) in _SERVED_KINDS
    return is_ours or is_served or holds_nothing(layer)


def make_in_place(cache: DynamicCache, max_slots: int, image_layers: Collection[int] = ()) -> None:
    """Gives a `DynamicCache` layers that can commit and abort. The cache stays the same object.

    Args:
        cache (`DynamicCache`): the cache, empty or filled.
        max_slots (`int`): most slots of a buffer, unless more are needed at once.
        image_layers (`Collection[int]`): the layers that hold states of images in place of those of the text.
    """
    layers: list[Any] = list(cache.layers)
    # A cache that was made without a config adds its layers on first use. Those of images must stand there before.
    layers += [DynamicLayer() for _ in range(len(layers), max(image_layers, default=-1) + 1)]
    cache.layers = [
        image_states(layer) if number in image_layers else _committable(layer, max_slots)
        for number, layer in enumerate(layers)
    ]
    # A crop that one layer refuses must be refused by the first one, or the layers would differ in length.
    slots = [layer for layer in cache.layers if isinstance(layer, InPlaceLayer)]
    min_length = max((layer.min_length for layer in slots), default=0)
    for layer in slots:
        layer.min_length = min_length
    # Of this class are the layers that are added on first use.
    cache.layer_class_to_replicate = InPlaceLayer if cache.layer_class_to_replicate is not None else None


def _committable(layer: Any, max_slots: int) -> Any:
    if holds_nothing(layer):
        return layer
    if not isinstance(layer, LinearAttentionLayer):
        if isinstance(layer, ReferenceWindowLayer) or getattr(layer, "_layer_type", None) == REFERENCE_WINDOW:
            return reference_window(layer, max_slots)
        return (indexed_in_place if has_index(layer) else in_place)(layer, max_slots)
    if not isinstance(layer, DynamicLayer):
        return _copy(layer)
    hybrid = HybridLayer(layer.number_of_states, max_slots)
    take_content(hybrid, layer)
    copy_states(layer, hybrid)
    return hybrid


def recurrent_layers(cache: Cache) -> list[RecurrentLayer]:
    """The layers of a cache that have recurrent or convolutional states."""
    return [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]


def _copy(layer: LinearAttentionLayer) -> RecurrentLayer:
    made = RecurrentLayer(layer.number_of_states)
    copy_states(layer, made)
    return made


@dataclass
class _StoredRow:
    layers: list[Any]  # for each layer, what its `take_row` returned
    length: int


class CacheTransaction:
    """
    Keeps track of the committed slots of a cache. `begin` announces a block of new slots; `commit`, `commit_prompt` or
    `abort` ends it.

    Args:
        cache (`Cache`): a cache whose layers `make_in_place` has made.
        context (`ContextSlots`): the slots that the cache holds, which count as committed.

    Attributes:
        rows (`list[int]`): which rows of the batch are in the cache now.
    """

    def __init__(self, cache: Cache, context: ContextSlots):
        self.cache = cache
        self.context = context
        self.rows = list(range(len(context.lengths)))
        self._first = replace(context)  # a copy, because `commit` grows the context in place
        self._prompt_mask, self._inputs = context.prompt_mask, context.inputs  # of all rows of the batch
        self._stored: dict[int, _StoredRow] = {}
        self._is_open = False
        self._committing: list[int] | None = None  # the lengths before a commit that is not finished
        self._first_states = [_copy(layer) for layer in recurrent_layers(cache)]

    def begin(self) -> None:
        """Announces a forward that appends a block of slots behind the committed ones."""
        assert not self._is_open, "The last block was neither committed nor aborted."
        self._is_open = True
        for layer in self.cache.layers:
            if not holds_nothing(layer):
                layer.begin(self.context.num_slots)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Returns to the present content of the cache when the block ends, whatever was appended in it."""
        context, states = replace(self.context), [_copy(layer) for layer in recurrent_layers(self.cache)]
        try:
            yield
        finally:
            self.context = context
            self.abort()
            self._put_states(states)

    def commit_prompt(self, prompt_mask: torch.Tensor | None, inputs: dict[str, torch.Tensor] | None = None) -> None:
        """
        Keeps every slot of the block, which is the prompt.

        Args:
            prompt_mask (`torch.BoolTensor` of shape `[B, S]`, *optional*): mask of all slots of the cache, false at
                padding; `None` without padding.
            inputs (`dict[str, torch.Tensor]`, *optional*): see `ContextSlots`.
        """
        self.context = ContextSlots([self.cache.get_seq_length()] * len(self.rows), prompt_mask, inputs or {})
        self._prompt_mask, self._inputs = prompt_mask, self.context.inputs
        self._is_open = False

    def commit(
        self, counts: Sequence[int], paths: torch.Tensor | None = None, row_counts: torch.Tensor | None = None
    ) -> None:
        """
        Keeps accepted slots of the block, moves recurrent states behind them, and drops the other slots. The context
        grows last, so that it names only untouched slots if this method is interrupted.

        Args:
            counts (`Sequence[int]`): how many slots each row keeps.
            paths (`torch.LongTensor` of shape `[B, A]`, *optional*): which slots of the block each row keeps, in
                order; entries behind a row's count are ignored. `None`: the first slots of the block.
            row_counts (`torch.LongTensor` of shape `[B]`, *optional*): `counts`, if they are on the device already.
                Making a tensor from a list waits for the device.
        """
        recurrent = recurrent_layers(self.cache)
        if recurrent:
            self._committing = self.context.lengths
            if row_counts is None:
                row_counts = torch.tensor(counts, device=recurrent[0].device)
            nodes = paths
            if nodes is None:
                nodes = torch.arange(max(counts), device=row_counts.device).expand(len(counts), -1)
            for layer in recurrent:
                layer.advance(counts, nodes, row_counts)
        start = self.context.num_slots
        if not self.context.is_ragged and min(counts) == max(counts):
            for layer in own_layers(self.cache):
                if paths is None:
                    layer.truncate(start + counts[0])
                else:
                    layer.keep_slots(start, paths)
        else:
            self._commit_ragged(start, counts, paths)
        self.context.grow(counts)
        for layer in recurrent:
            layer.settle()
        self._committing = None
        self._is_open = False

    def _commit_ragged(self, start: int, counts: Sequence[int], paths: torch.Tensor | None) -> None:
        layers = own_layers(self.cache)
        if paths is None:
            paths = torch.arange(max(counts), device=layers[0].device).expand(len(counts), -1)
        steps = torch.arange(paths.shape[1], device=paths.device)
        places = self.context.row_lengths(paths.device).unsqueeze(1) + steps
        length = max(held + count for held, count in zip(self.context.lengths, counts, strict=True))
        for layer in layers:
            layer.move_slots(start, paths, places, length)

    def abort(self) -> None:
        """Drops the block, that is, all slots behind the committed ones."""
        truncate(self.cache, self.context.num_slots)
        for layer in recurrent_layers(self.cache):
            layer.drop()
        self._is_open = False

    def revert(self) -> None:
        """Drops all slots that came after the transaction was made."""
        self.context, self._prompt_mask, self._inputs = self._first, self._first.prompt_mask, self._first.inputs
        self.abort()
        self._put_states(self._first_states)

    def _put_states(self, states: Sequence[RecurrentLayer]) -> None:
        for layer, earlier in zip(recurrent_layers(self.cache), states, strict=True):
            copy_states(earlier, layer)

    def take_back_last(self) -> None:
        """Drops the last committed slot of each row. Only right after `commit_prompt`, when all rows use the same
        slots. Not for recurrent layers, which keep no state before the last token."""
        mask = self.context.prompt_mask
        lengths = [length - 1 for length in self.context.lengths]
        self.context = replace(self.context, lengths=lengths, prompt_mask=None if mask is None else mask[:, :-1])
        self.abort()

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """
        Makes the cache whole again if the block raises an exception: every layer has the same slots, every row of the
        batch is back, and only slots that every row has committed remain. Recurrent states cannot go back to a length
        that they have passed: if rows differ in length, the cache returns to where the transaction began. So it does
        after a refusal, and the same call can be made without the draft.
        """
        try:
            yield
        except BaseException as error:
            self._undo(returns=isinstance(error, MSDUnsupportedError))
            raise

    def _undo(self, returns: bool) -> None:
        recurrent = recurrent_layers(self.cache)
        # A commit that was interrupted counts if the context has grown.
        is_committed = self._committing is not None and self.context.lengths is not self._committing
        self._committing = None
        for layer in recurrent:
            if is_committed:
                layer.settle()
            else:
                layer.drop()
        lengths = [*self.context.lengths, *(row.length for row in self._stored.values())]
        self.restore_rows()
        if returns or (recurrent and (min(lengths) != max(lengths) or lengths == self._first.lengths)):
            self.revert()
        else:
            truncate(self.cache, min(lengths))

    def keep_rows(self, places: Sequence[int], store_others: bool = False) -> None:
        """
        Keeps only the rows at the given places of the cache, in that order.

        Args:
            places (`Sequence[int]`): indices of rows of the cache.
            store_others (`bool`): copy the other rows first, so that `restore_rows` can put them back.
        """
        if store_others:
            for place in sorted(set(range(len(self.rows))) - set(places)):
                self._stored[self.rows[place]] = self._store(place)
        self.context = self.context.select(places)
        self.rows = [self.rows[place] for place in places]
        for layer in own_layers(self.cache):
            layer.select_rows(places, self.context.num_slots)

    def restore_rows(self) -> None:
        """Puts the stored rows back, in the order of the batch."""
        if not self._stored:
            return
        for place, row in enumerate(self.rows):
            self._stored[row] = self._store(place)
        self.rows = sorted(self._stored)
        stored = [self._stored[row] for row in self.rows]
        for number, layer in enumerate(own_layers(self.cache)):
            layer.put_rows([row.layers[number] for row in stored])
        self.context = ContextSlots([row.length for row in stored], self._prompt_mask, self._inputs)
        self._stored = {}

    def _store(self, place: int) -> _StoredRow:
        length = self.context.lengths[place]
        return _StoredRow([layer.take_row(place, length) for layer in own_layers(self.cache)], length)


__all__ = ["CacheTransaction", "can_commit", "make_in_place", "recurrent_layers"]
