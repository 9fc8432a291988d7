"""A KV cache layer that grows without copying what it holds, and that keeps accepted slots in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .slots import ContextSlots


# A full buffer is replaced by one with room for so many slots more, or for this part of those that it needs. Twice the
# size would hold a whole second context that may never come: answers end before their length limit.
MIN_ROOM = 64
ROOM = 1 / 8


class InPlaceLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` (`[B, heads, slots, head_dim]`) are views of preallocated buffers.

    `DynamicLayer.update` concatenates, which copies the whole layer at every step. Here new slots are written behind
    the old ones, and a buffer that is full is replaced by one with more room. A whole prompt is held as it came,
    without a copy: a forward over a prompt is where most memory is needed. Everything else that `generate` does with a
    layer (crop, reorder, repeat) is inherited: it may replace `keys` by another tensor, which the next update takes
    over.

    Args:
        max_slots (`int`, *optional*): no more than this many slots are allocated ahead of need.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_slots: int | None = None):
        super().__init__()
        self.max_slots = max_slots
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None  # of the buffers, as the last update left them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, length = self.get_seq_length(), key_states.shape[-2]
        if start == 0 and self._holds_as_it_came(key_states) and self._holds_as_it_came(value_states):
            # A buffer would have no room for more either.
            self.keys, self.values = key_states, value_states
            self._buffers = self._views = None
            return key_states, value_states
        end = start + length
        if self._buffers is None or not self._shows_buffers() or end > self._buffers[0].shape[-2]:
            self._buffers = self._reserve(key_states, value_states, start, end)
        key_buffer, value_buffer = self._buffers
        key_buffer.narrow(2, start, length).copy_(key_states)
        value_buffer.narrow(2, start, length).copy_(value_states)
        self.keys, self.values = self._views = key_buffer.narrow(2, 0, end), value_buffer.narrow(2, 0, end)
        # A whole prompt is attended to as it came: not every attention kernel likes gaps between heads.
        return (self.keys, self.values) if start else (key_states, value_states)

    def keep_slots(self, start: int, slots: torch.Tensor) -> None:
        """Keeps the slots before `start` and, of those from `start` on, only `slots` (`[B, A]`, counted from
        `start`), which move to `start, start + 1, ...`. The rest is dropped. Copies A slots."""
        if not self.is_initialized:
            return
        self._own()
        end = start + slots.shape[1]
        slots = slots + start
        for states in (self.keys, self.values):
            if len(slots) == 1:  # half the time of a gather
                kept = states.index_select(2, slots[0])
            else:
                kept = states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
            states.narrow(2, start, kept.shape[2]).copy_(kept)
        self.truncate(end)

    def move_slots(self, start: int, slots: torch.Tensor, places: torch.Tensor, length: int) -> None:
        """Like `keep_slots`, with a place of its own for each slot.

        Args:
            start (`int`): slots are counted from here.
            slots (`torch.LongTensor` of shape `[B, A]`): what is kept of those from `start` on.
            places (`torch.LongTensor` of shape `[B, A]`): where it goes, counted from 0.
            length (`int`): slots of the cache afterwards.
        """
        if not self.is_initialized:
            return
        self._own()
        for states in (self.keys, self.values):
            index = (slots + start)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            target = places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            states.scatter_(2, target, states.gather(2, index))
        self.truncate(length)

    def truncate(self, length: int) -> None:
        """Drops the slots from `length` on. Copies nothing."""
        if self.is_initialized and length < self.get_seq_length():
            self.keys, self.values = self.keys.narrow(2, 0, length), self.values.narrow(2, 0, length)

    def reset(self) -> None:
        super().reset()
        self._buffers = self._views = None

    def _holds_as_it_came(self, states: torch.Tensor) -> bool:
        """Whether a prompt's keys or values are held as they are: they keep no more memory than their own elements,
        and may be written to outside of inference mode."""
        return states.untyped_storage().nbytes() == states.nbytes and not states.is_inference()

    def _own(self) -> None:
        """Copies what is held as it came, before it is written to."""
        if self._buffers is None:
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _shows_buffers(self) -> bool:
        """Whether `keys` and `values` still are views of the buffers, and not tensors that someone put there."""
        assert self._buffers is not None
        if self._views is not None and self.keys is self._views[0] and self.values is self._views[1]:
            return True  # the same is found below, in more time
        return all(
            view.shape[:-2] == buffer.shape[:-2] and view.data_ptr() == buffer.data_ptr()
            for view, buffer in zip((self.keys, self.values), self._buffers, strict=True)
        )

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, needed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = needed + max(int(ROOM * needed), MIN_ROOM) if held else needed
        if self.max_slots is not None:
            slots = max(min(slots, self.max_slots), needed)
        # Values may have another head size than keys. One may be written to outside of inference mode too.
        with torch.inference_mode(False):
            key_buffer = key_states.new_empty(*key_states.shape[:-2], slots, key_states.shape[-1])
            value_buffer = value_states.new_empty(*value_states.shape[:-2], slots, value_states.shape[-1])
        if held:
            key_buffer[:, :, :held] = self.keys
            value_buffer[:, :, :held] = self.values
        return key_buffer, value_buffer


def make_in_place(cache: DynamicCache, max_slots: int) -> None:
    """Turns the layers of a `DynamicCache` into `InPlaceLayer`s, without replacing the cache object itself.

    Sliding-window layers become full ones, which their masks make equal: a branch of a tree that is not taken must not
    push slots out of the window. Slots that have left a window already are filled with zeros, which no mask shows.
    """
    cache.layers = [_in_place(layer, max_slots) for layer in cache.layers]
    # A cache that was made without a config adds layers on first use.
    cache.layer_class_to_replicate = InPlaceLayer if cache.layer_class_to_replicate is not None else None


def _in_place(layer: DynamicLayer, max_slots: int) -> InPlaceLayer:
    made = InPlaceLayer(max_slots)
    length = layer.get_seq_length()
    if length == 0:
        return made
    keys, values = layer.keys, layer.values
    made.lazy_initialization(keys, values)
    missing = length - keys.shape[-2]
    if missing:
        keys, values = (
            torch.cat([states.new_zeros(*states.shape[:-2], missing, states.shape[-1]), states], dim=-2)
            for states in (keys, values)
        )
    made.keys, made.values = keys, values
    return made


def keep_paths(cache: Cache, context: ContextSlots, paths: torch.Tensor | None, counts: Sequence[int]) -> None:
    """
    Keeps, of the slots behind the context, those of accepted nodes. The context is extended last: if this is
    interrupted, it still says which slots are untouched.

    Args:
        cache (`Cache`): of `InPlaceLayer`s.
        context (`ContextSlots`): is extended by them.
        paths (`torch.LongTensor` of shape `[B, A]`, *optional*): slots behind the context, in order; anything behind a
            row's own. `None` if they are the first ones in every row.
        counts (`Sequence[int]`): how many of them are each row's own.
    """
    start = context.num_slots
    if not context.is_ragged and min(counts) == max(counts):
        for layer in cache.layers:
            if paths is None:  # none has to move
                layer.truncate(start + counts[0])
            else:
                layer.keep_slots(start, paths.to(layer.device))
        context.grow(counts)
        return
    if paths is None:
        paths = torch.arange(max(counts), device=cache.layers[0].device).expand(len(counts), -1)
    places = context.row_lengths(paths.device).unsqueeze(1) + torch.arange(paths.shape[1], device=paths.device)
    length = max(held + count for held, count in zip(context.lengths, counts, strict=True))
    for layer in cache.layers:
        layer.move_slots(start, paths.to(layer.device), places.to(layer.device), length)
    context.grow(counts)


def truncate(cache: Cache, length: int) -> None:
    """`InPlaceLayer.truncate` on every layer of a cache."""
    for layer in cache.layers:
        layer.truncate(length)


def select_rows(cache: Cache, context: ContextSlots, rows: Sequence[int]) -> ContextSlots:
    """Keeps some rows of a batch, in the order given, and the slots that they use. Returns their context."""
    selected = context.select(rows)
    for layer in cache.layers:
        if layer.is_initialized:
            layer.truncate(selected.num_slots)
            layer.batch_select_indices(torch.tensor(rows, device=layer.device))
    return selected


def take_row(cache: Cache, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the keys and values `[1, heads, length, head_dim]` of a row, for each layer."""
    return [
        (layer.keys[row : row + 1, :, :length].clone(), layer.values[row : row + 1, :, :length].clone())
        if layer.is_initialized
        else (torch.empty(0), torch.empty(0))
        for layer in cache.layers
    ]


def put_rows(cache: Cache, rows: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Makes a cache hold rows that `take_row` gave, each from the first slot on; zeros behind shorter ones."""
    for number, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            continue
        layer.keys, layer.values = (
            pad_sequence([row[number][kind][0].transpose(0, 1) for row in rows], batch_first=True).transpose(1, 2)
            for kind in (0, 1)
        )


__all__ = ["InPlaceLayer", "keep_paths", "make_in_place", "put_rows", "select_rows", "take_row"]
