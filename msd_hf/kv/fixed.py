"""A KV cache in buffers of fixed shape, as compiled code needs it: tensors keep shape and address between rounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..compat import holds_nothing
from .in_place import InPlaceLayer, KeysAndValues, length_at_least


MIN_CAPACITY = 256


class FixedLayer(InPlaceLayer):
    """An `InPlaceLayer` whose buffers compiled code uses as a whole, with the free slots. The number of slots is a
    power of two, so that few shapes are compiled. New buffers are zeroed: attention multiplies the values of hidden
    slots by 0, which would turn a NaN there into a NaN of the result.

    Args:
        spare (`tuple[torch.Tensor, torch.Tensor]`, *optional*): buffers of an earlier call, used again if they have
            the right shape, because a CUDA graph is recorded for one address.
    """

    def __init__(self, spare: KeysAndValues | None = None):
        super().__init__()
        self._spare = spare

    def has_room(self, count: int) -> bool:
        """Whether the buffers have room for `count` more slots."""
        if self._buffers is None or not self._shows_buffers():
            return False
        return self.get_seq_length() + count <= self._buffers[0].shape[-2]

    def reserve(self, count: int) -> KeysAndValues:
        """Returns the buffers, replaced by larger ones if they lack room for `count` more slots."""
        held = self.get_seq_length()
        if self._buffers is None or not self.has_room(count):
            self._buffers = self._reserve(self.keys, self.values, held, held + count)
            self.show(held)
        return self._buffers

    def offer(self, buffers: KeysAndValues) -> None:
        """Hands in spare buffers. The layer takes them the next time it needs buffers, if their shape fits."""
        self._spare = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer)

    def was_offered(self, states: torch.Tensor, needed: int) -> bool:
        """Whether the layer has spare buffers that fit `needed` slots of keys like `states`."""
        return self._spare is not None and _fits(self._spare[0], states, _capacity_for(needed))

    def show(self, length: int) -> None:
        """Makes the first `length` slots of the buffers the content of the layer."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _holds_as_it_came(self, states: torch.Tensor) -> bool:
        # If spare buffers fit, the prompt goes there at once. Held as it came, it would be copied by the next update.
        return not self.was_offered(states, states.shape[-2]) and super()._holds_as_it_came(states)

    @property
    def buffers(self) -> KeysAndValues | None:
        """The layer's buffers, or the spare ones if it has not needed any; `None` if other code has put tensors in
        place of its views."""
        if self._buffers is None:
            return self._spare
        return self._buffers if self._shows_buffers() else None

    def _reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, needed: int) -> KeysAndValues:
        num_slots = _capacity_for(needed)
        spare = self._spare or (None, None)
        self._spare = None
        key_buffer, value_buffer = (
            _zeros(states, num_slots, old) for states, old in zip((key_states, value_states), spare, strict=True)
        )
        if held:
            key_buffer[:, :, :held] = self.keys
            value_buffer[:, :, :held] = self.values
        return key_buffer, value_buffer


def _capacity_for(needed: int) -> int:
    return max(1 << (needed - 1).bit_length(), MIN_CAPACITY)


def _zeros(states: torch.Tensor, num_slots: int, spare: torch.Tensor | None, count: int | None = None) -> torch.Tensor:
    """A zeroed buffer of `num_slots` slots for keys or values like `states`: `spare` if it fits, else a new one. With
    `count`, one tensor of that many buffers."""
    if spare is not None and _fits(spare, states, num_slots):
        return spare.zero_()
    shape = (*states.shape[:-2], num_slots, states.shape[-1])
    with torch.inference_mode(False):  # so that code outside of it may write to the buffer
        buffer = states.new_zeros(shape if count is None else (count, *shape))
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _fits(buffer: torch.Tensor, states: torch.Tensor, num_slots: int) -> bool:
    shape = (*states.shape[:-2], num_slots, states.shape[-1])
    return (buffer.shape, buffer.dtype, buffer.device) == (shape, states.dtype, states.device)


class SpareBuffers:
    """Keeps the cache buffers that one call leaves to the next call of the same model. `take` also removes them, so
    that two calls never share buffers, in whatever threads they run."""

    def __init__(self) -> None:
        self._buffers: list[KeysAndValues | None] = []
        self._lock = threading.Lock()

    def take(self, num_layers: int) -> Sequence[KeysAndValues | None]:
        """Removes and returns the kept buffers, one pair per layer; `None` for a layer without buffers, and for each
        layer if their number differs."""
        with self._lock:
            taken, self._buffers = self._buffers, []
        return taken if len(taken) == num_layers else [None] * num_layers

    def leave(self, cache: Cache) -> None:
        """Keeps the buffers of a cache that is not needed any more."""
        buffers = [layer.buffers if isinstance(layer, FixedLayer) else None for layer in cache.layers]
        is_whole = all(layer.buffers is not None for layer in _filled(cache))
        if is_whole and any(pair is not None for pair in buffers):
            with self._lock:
                self._buffers = buffers


@contextmanager
def buffers_left(wanted: bool, *caches: tuple[Cache, SpareBuffers]) -> Iterator[None]:
    """If `wanted`, leaves the buffers of the caches to later calls when the block ends, also by an exception."""
    try:
        yield
    finally:
        if wanted:
            for cache, spares in caches:
                spares.leave(cache)


def make_fixed(cache: Cache, spares: SpareBuffers, num_layers: int) -> None:
    """
    Turns the layers of a cache into `FixedLayer`s, except those that never hold anything. The cache stays the same
    object.

    Args:
        cache (`Cache`): a cache of `DynamicLayer`s, or an empty one.
        spares (`SpareBuffers`): buffers that earlier calls of the model have left.
        num_layers (`int`): number of layers of the model.
    """
    # A cache that was made from a configuration has all its layers; others add theirs on first use.
    num_missing = num_layers - len(cache.layers) if cache.layer_class_to_replicate is not None else 0
    old: list[DynamicLayer | None] = [*cache.layers, *[None] * num_missing]
    cache.layers = [
        layer if holds_nothing(layer) else _fixed(layer, spare)
        for layer, spare in zip(old, spares.take(len(old)), strict=True)
    ]
    cache.layer_class_to_replicate = None


def _fixed(layer: DynamicLayer | None, spare: KeysAndValues | None) -> FixedLayer:
    made = FixedLayer(spare)
    if layer is not None and layer.get_seq_length():
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
        made.min_length = length_at_least(layer)
    return made


def _filled(cache: Cache) -> list[FixedLayer]:
    """The layers that hold slots. The layer of the cache for a layer that reads another one's keys stays empty."""
    return [layer for layer in cache.layers if isinstance(layer, FixedLayer) and layer.is_initialized]


def reserve(cache: Cache, count: int) -> list[KeysAndValues]:
    """
    Returns the buffers of all layers that hold slots, with room for `count` more. New buffers share one block of
    memory if all layers have the same shape, so that `move_slots` moves the slots of all layers in one operation.

    Args:
        cache (`Cache`): a cache of `FixedLayer`s on one device, after the prompt.
        count (`int`): number of slots that are needed behind the filled ones.
    """
    layers = _filled(cache)
    first = layers[0]
    needed = first.get_seq_length() + count
    if not first.has_room(count) and not first.was_offered(first.keys, needed):
        kinds = {(states.shape, states.dtype) for layer in layers for states in (layer.keys, layer.values)}
        if len(kinds) == 1:
            together = _zeros(first.keys, _capacity_for(needed), None, 2 * len(layers))
            for number, layer in enumerate(layers):
                layer.offer((together[2 * number], together[2 * number + 1]))
    return [layer.reserve(count) for layer in layers]


def close_slots(cache: Cache, length: int) -> None:
    """Makes the first `length` slots of the buffers the content of a cache of `FixedLayer`s."""
    for layer in _filled(cache):
        layer.show(length)


def parts_of(buffers: Sequence[KeysAndValues]) -> list[torch.Tensor]:
    """Keys and values of all layers, `[..., heads, slots, head_dim]`: one tensor if they share a block of memory, else
    one tensor each."""
    parts = [part for pair in buffers for part in pair]
    first, size = parts[0], parts[0].numel()
    for number, part in enumerate(parts):
        same_kind = part.shape == first.shape and part.dtype == first.dtype and part.is_contiguous()
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_kind and same_memory and part.storage_offset() == first.storage_offset() + number * size):
            return parts
    return [first.as_strided((len(parts), *first.shape), (size, *first.stride()))]


def move_slots(parts: Sequence[torch.Tensor], sources: torch.Tensor, places: torch.Tensor) -> None:
    """Copies slots from `sources` `[A]` to `places` `[A]` in each tensor of `parts`, the result of `parts_of`."""
    for part in parts:
        part.index_copy_(-2, places, part.index_select(-2, sources))


class _WholeBuffers(DynamicLayer):
    """A layer as compiled code sees it: new slots go to given places, and attention gets the whole buffers."""

    def __init__(self, buffers: KeysAndValues, places: torch.Tensor):
        super().__init__()
        self.keys, self.values = buffers
        self.places = places
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> KeysAndValues:
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys, self.values


def whole_buffers(cache: Cache, buffers: Sequence[KeysAndValues], places: torch.Tensor) -> Cache:
    """
    Makes the cache for one compiled forward, in which attention reads whole buffers. Afterwards `close_slots` makes
    the new slots part of the real cache.

    Args:
        cache (`Cache`): the real cache.
        buffers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): its keys and values, as `reserve` returned them.
        places (`torch.LongTensor` of shape `[N]`): the slots that the N new keys and values go to.
    """
    filled, pairs = set(map(id, _filled(cache))), iter(buffers)
    # Layers that hold nothing keep their place, because attention finds its layer by number.
    layers = [_WholeBuffers(next(pairs), places) if id(layer) in filled else DynamicLayer() for layer in cache.layers]
    return Cache(layers=layers)


__all__ = [
    "FixedLayer",
    "SpareBuffers",
    "buffers_left",
    "close_slots",
    "make_fixed",
    "move_slots",
    "parts_of",
    "reserve",
    "whole_buffers",
]
