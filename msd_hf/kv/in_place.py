"""A KV cache layer that grows without copying what it holds, and that keeps accepted slots in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..compat import holds_nothing
from ..errors import MSDCacheError


# A full buffer is replaced by one with free slots behind the needed ones: `MIN_ROOM` slots, or the share `ROOM` of the
# needed slots if that is more. Doubling would reserve a second context that may never come, because most answers end
# before their length limit.
MIN_ROOM = 64
ROOM = 1 / 8

# While the keys of a layer without a buffer take no more bytes than this, `DynamicLayer`'s way adds a single token: to
# copy so little takes less time than to write into a buffer and to look at a part of it. A pair whose drafting pauses
# runs in such steps alone.
_CHEAP_COPY = 128 * 1024

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class InPlaceLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` (`[B, heads, slots, head_dim]`) are views of preallocated buffers.

    `DynamicLayer.update` concatenates, which copies the whole layer at every step. This layer writes new slots behind
    the old ones and replaces a full buffer by a larger one. It holds a whole prompt as it came, without a copy, since
    the forward over a prompt is where most memory is needed. Everything else that `generate` does with a layer (crop,
    reorder, repeat) is inherited; it may replace `keys` by another tensor, which the next update copies into a buffer.

    The methods below `update` are what [`CacheTransaction`] asks of every kind of layer.

    Args:
        max_slots (`int`, *optional*): most slots of a buffer, unless more are needed at once.
        min_length (`int`, defaults to 0): fewest slots to which the layer may be cropped. With fewer, a token would
            see slots that have left a sliding window and are lost.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_slots: int | None = None, min_length: int = 0):
        super().__init__()
        self.max_slots = max_slots
        self.min_length = min_length
        self._buffers: KeysAndValues | None = None
        self._views: KeysAndValues | None = None  # `keys` and `values` as this layer set them last

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> KeysAndValues:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self._buffers is None and key_states.shape[-2] == 1 and self.keys.nbytes <= _CHEAP_COPY:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
            return self.keys, self.values
        start, length = self.get_seq_length(), key_states.shape[-2]
        if start == 0 and self._holds_as_it_came(key_states) and self._holds_as_it_came(value_states):
            # Keeps the first block as it came, without a buffer. `_reserve` would make one with no free slots, so
            # copying the block into it now would not spare the next update a copy.
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
        # Attention reads a first block as it came. A view of the buffer may have gaps between heads, which not every
        # attention kernel takes.
        return (self.keys, self.values) if start else (key_states, value_states)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """
        Crops as `DynamicLayer` does.

        Raises:
            MSDCacheError: when fewer than `min_length` slots would be left. The layer stays as it was.
        """
        before = self.keys, self.values, self.get_seq_length()
        super().crop(*args, **kwargs)
        length = self.get_seq_length()
        if length < min(self.min_length, before[2]):
            self.keys, self.values, _ = before
            raise MSDCacheError(
                f"The cache cannot be cropped from {before[2]} to {length} tokens: layers with a sliding window have "
                f"lost what a text of fewer than {self.min_length} tokens needs. Start again with an empty cache."
            )

    def begin(self, text_length: int) -> None:
        """Is told the number of committed slots before each block. Keys and values tell it themselves."""

    def keep_slots(self, start: int, slots: torch.Tensor) -> None:
        """
        Moves accepted slots to `start, start + 1, ...` and drops all slots behind them. Copies only these A slots.

        Args:
            start (`int`): number of slots that stay untouched.
            slots (`torch.LongTensor` of shape `[B, A]`): the accepted slots, counted from `start`.
        """
        if not self.is_initialized:
            return
        self._own()
        end = start + slots.shape[1]
        slots = slots.to(self.device) + start
        row = slots[0] if len(slots) == 1 else None
        for states in (self.keys, self.values):
            if row is not None:  # takes half the time of a gather
                kept = states.index_select(2, row)
            else:
                kept = states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
            states.narrow(2, start, kept.shape[2]).copy_(kept)
        self.truncate(end)

    def move_slots(self, start: int, slots: torch.Tensor, places: torch.Tensor, length: int) -> None:
        """
        Copies accepted slots to given places, which may differ from row to row, and drops the slots from `length` on.

        Args:
            start (`int`): the slot from which `slots` are counted.
            slots (`torch.LongTensor` of shape `[B, A]`): the accepted slots.
            places (`torch.LongTensor` of shape `[B, A]`): their new slots, counted from the first slot of the cache.
            length (`int`): number of slots of the cache afterwards.
        """
        if not self.is_initialized:
            return
        self._own()
        slots, places = slots.to(self.device), places.to(self.device)
        for states in (self.keys, self.values):
            index = (slots + start)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            target = places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            states.scatter_(2, target, states.gather(2, index))
        self.truncate(length)

    def truncate(self, length: int) -> None:
        """Drops the slots from `length` on. Copies nothing."""
        if self.is_initialized and length < self.get_seq_length():
            shows_buffers = self._shows_views
            self.keys, self.values = self.keys.narrow(2, 0, length), self.values.narrow(2, 0, length)
            if shows_buffers:
                self._views = self.keys, self.values

    def select_rows(self, rows: Sequence[int], length: int) -> None:
        """Keeps the given rows of the batch, in that order, and their first `length` slots."""
        if self.is_initialized:
            self.truncate(length)
            self.batch_select_indices(torch.tensor(rows, device=self.device))

    def take_row(self, row: int, length: int) -> KeysAndValues:
        """Copies of the keys and values `[1, heads, length, head_dim]` of a row."""
        if not self.is_initialized:
            return torch.empty(0), torch.empty(0)
        return self.keys[row : row + 1, :, :length].clone(), self.values[row : row + 1, :, :length].clone()

    def put_rows(self, rows: Sequence[KeysAndValues]) -> None:
        """Replaces the content of the layer by rows that `take_row` returned, with zeros behind shorter rows."""
        if self.is_initialized:
            self.keys, self.values = (
                pad_sequence([row[kind][0].transpose(0, 1) for row in rows], batch_first=True).transpose(1, 2)
                for kind in (0, 1)
            )

    def reset(self) -> None:
        super().reset()
        self._buffers = self._views = None

    def _holds_as_it_came(self, states: torch.Tensor) -> bool:
        """Whether the keys or the values of a prompt can be held without a copy. If not, they would keep a larger
        tensor alive, or could not be written to outside of inference mode."""
        return states.untyped_storage().nbytes() == states.nbytes and not states.is_inference()

    def _own(self) -> None:
        """Copies keys and values that are held as they came, before they change: other code may hold them too."""
        if self._buffers is None:
            self.keys, self.values = self.keys.clone(), self.values.clone()

    @property
    def _shows_views(self) -> bool:
        """Whether `keys` and `values` are the views of the buffers that this layer put there last."""
        views = self._views
        return views is not None and self.keys is views[0] and self.values is views[1]

    def _shows_buffers(self) -> bool:
        """Whether `keys` and `values` are still views of the buffers. Inherited methods put other tensors there."""
        assert self._buffers is not None
        if self._shows_views:
            return True  # Fast path; the check below gives the same answer.
        return all(
            view.shape[:-2] == buffer.shape[:-2] and view.data_ptr() == buffer.data_ptr()
            for view, buffer in zip((self.keys, self.values), self._buffers, strict=True)
        )

    def _reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, needed: int) -> KeysAndValues:
        slots = needed + max(int(ROOM * needed), MIN_ROOM) if held else needed
        if self.max_slots is not None:
            slots = max(min(slots, self.max_slots), needed)
        # Values may have another head size than keys. Both buffers are made outside of inference mode, so that code
        # outside of it may write to them later.
        with torch.inference_mode(False):
            key_buffer = key_states.new_empty(*key_states.shape[:-2], slots, key_states.shape[-1])
            value_buffer = value_states.new_empty(*value_states.shape[:-2], slots, value_states.shape[-1])
        if held:
            key_buffer[:, :, :held] = self.keys
            value_buffer[:, :, :held] = self.values
        return key_buffer, value_buffer


def in_place(layer: DynamicLayer, max_slots: int) -> InPlaceLayer:
    """Makes an `InPlaceLayer` with the content of another layer."""
    made = InPlaceLayer(max_slots)
    take_content(made, layer)
    return made


def take_content(made: InPlaceLayer, layer: DynamicLayer) -> None:
    """Takes over the keys and values of another layer.

    A layer with a sliding window becomes a full one, because a rejected branch of a tree must not push slots out of
    the window. The masks of the verification apply the window instead. Slots that have already left the window are
    filled with zeros, which the masks hide, and the layer cannot be cropped back to where they would be seen.
    """
    made.min_length = length_at_least(layer)
    length = layer.get_seq_length()
    if length == 0:
        return
    keys, values = layer.keys, layer.values
    made.lazy_initialization(keys, values)
    missing = length - keys.shape[-2]
    if missing:
        keys, values = (
            torch.cat([states.new_zeros(*states.shape[:-2], missing, states.shape[-1]), states], dim=-2)
            for states in (keys, values)
        )
    made.keys, made.values = keys, values


def length_at_least(layer: DynamicLayer) -> int:
    """The fewest slots to which a layer may be cropped, see `InPlaceLayer`."""
    if isinstance(layer, InPlaceLayer):
        return layer.min_length
    num_lost = layer.get_seq_length() - layer.keys.shape[-2] if layer.get_seq_length() else 0
    return num_lost + layer.sliding_window - 1 if num_lost else 0  # type: ignore[attr-defined]


def own_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that hold something. A layer of a model that reads the keys of an earlier one has a cache
    layer that holds nothing, or one that stays empty; both are passed over."""
    # Layers without slots have no such flag.
    return [layer for layer in cache.layers if not holds_nothing(layer) and getattr(layer, "is_initialized", True)]


def truncate(cache: Cache, length: int) -> None:
    """Drops the slots from `length` on in every layer of a cache."""
    for layer in own_layers(cache):
        layer.truncate(length)


__all__ = ["InPlaceLayer", "KeysAndValues", "in_place", "length_at_least", "own_layers", "take_content", "truncate"]
