"""A KV cache whose tensors keep their shapes and addresses from round to round, as compiled code needs them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .in_place import InPlaceLayer


MIN_CAPACITY = 256

Buffers = tuple[torch.Tensor, torch.Tensor]


class StaticSlotsLayer(InPlaceLayer):
    """An `InPlaceLayer` of which compiled code may use the whole buffers. Their number of slots is a power of two, so
    that few shapes are compiled; they hold no NaN, since what a mask hides is still multiplied by 0.

    Args:
        spare (`tuple[torch.Tensor, torch.Tensor]`, *optional*): buffers of an earlier call, used again where they
            have the right shape: a CUDA graph is recorded for one address.
    """

    def __init__(self, spare: Buffers | None = None):
        super().__init__()
        self._spare = spare

    def has_room(self, count: int) -> bool:
        """Whether the buffers have room for `count` more slots."""
        if self._buffers is None or not self._shows_buffers():
            return False
        return self.get_seq_length() + count <= self._buffers[0].shape[-2]

    def reserve(self, count: int) -> Buffers:
        """The buffers, with room for `count` more slots."""
        held = self.get_seq_length()
        if self._buffers is None or not self.has_room(count):
            self._buffers = self._reserve(self.keys, self.values, held, held + count)
            self.show(held)
        return self._buffers

    def offer(self, buffers: Buffers) -> None:
        """Gives the layer buffers to use when it needs new ones, if they have the right shape."""
        self._spare = buffers
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer)

    def was_offered(self, states: torch.Tensor, needed: int) -> bool:
        """Whether it was given buffers for so many slots of such states."""
        return self._spare is not None and _fits(self._spare[0], states, _capacity_for(needed))

    def show(self, length: int) -> None:
        """Makes the first `length` slots of the buffers what the layer holds."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _holds_as_it_came(self, states: torch.Tensor) -> bool:
        # Or there is room already.
        return not self.was_offered(states, states.shape[-2]) and super()._holds_as_it_came(states)

    @property
    def buffers(self) -> Buffers | None:
        """What the layer holds its slots in, or was given to do so; `None` if something else took their place."""
        if self._buffers is None:
            return self._spare
        return self._buffers if self._shows_buffers() else None

    def _reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, needed: int) -> Buffers:
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
    """A buffer like the states, or as many as are to lie behind each other."""
    if spare is not None and _fits(spare, states, num_slots):
        return spare.zero_()
    shape = (*states.shape[:-2], num_slots, states.shape[-1])
    with torch.inference_mode(False):  # as in `InPlaceLayer`
        buffer = states.new_zeros(shape if count is None else (count, *shape))
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _fits(buffer: torch.Tensor, states: torch.Tensor, num_slots: int) -> bool:
    shape = (*states.shape[:-2], num_slots, states.shape[-1])
    return (buffer.shape, buffer.dtype, buffer.device) == (shape, states.dtype, states.device)


class _WholeBuffers(DynamicLayer):
    """A layer as compiled code sees it: new slots go to given places, and attention gets all slots there are."""

    def __init__(self, buffers: Buffers, places: torch.Tensor):
        super().__init__()
        self.keys, self.values = buffers
        self.places = places
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> Buffers:
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys, self.values


def reserve(cache: Cache, count: int) -> list[Buffers]:
    """
    The buffers of all layers, with room for `count` more slots. New ones lie behind each other in memory, so that
    `move_slots` can reach all of them at once.

    Args:
        cache (`Cache`): of `StaticSlotsLayer`s on one device.
        count (`int`): slots.
    """
    layers: list[StaticSlotsLayer] = cache.layers  # type: ignore[assignment]
    first = layers[0]
    needed = first.get_seq_length() + count
    if not first.has_room(count) and not first.was_offered(first.keys, needed):
        kinds = {(states.shape, states.dtype) for layer in layers for states in (layer.keys, layer.values)}
        if len(kinds) == 1:
            together = _zeros(first.keys, _capacity_for(needed), None, 2 * len(layers))
            for number, layer in enumerate(layers):
                layer.offer((together[2 * number], together[2 * number + 1]))
    return [layer.reserve(count) for layer in layers]


def parts_of(buffers: Sequence[Buffers]) -> list[torch.Tensor]:
    """Keys and values of all layers, `[..., heads, slots, head_dim]`: as one tensor if they lie behind each other in
    memory."""
    parts = [part for pair in buffers for part in pair]
    first, size = parts[0], parts[0].numel()
    for number, part in enumerate(parts):
        same_kind = part.shape == first.shape and part.dtype == first.dtype and part.is_contiguous()
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_kind and same_memory and part.storage_offset() == first.storage_offset() + number * size):
            return parts
    return [first.as_strided((len(parts), *first.shape), (size, *first.stride()))]


def move_slots(parts: Sequence[torch.Tensor], sources: torch.Tensor, places: torch.Tensor) -> None:
    """Copies the slots `sources` `[A]` of what `parts_of` gave to `places` `[A]`."""
    for part in parts:
        part.index_copy_(-2, places, part.index_select(-2, sources))


def whole_buffers(buffers: Sequence[Buffers], places: torch.Tensor) -> Cache:
    """
    The cache for one compiled forward, which fills some slots. They are part of the cache itself once `close_slots` is
    called.

    Args:
        buffers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): keys and values of each layer.
        places (`torch.LongTensor` of shape `[N]`): of the new slots.
    """
    return Cache(layers=[_WholeBuffers(pair, places) for pair in buffers])


def close_slots(cache: Cache, length: int) -> None:
    """Makes the first `length` slots what the cache holds."""
    for layer in cache.layers:
        layer.show(length)


# Of models, the buffers that their last call used. Whoever uses them takes them out.
_spare_buffers: weakref.WeakKeyDictionary[nn.Module, list[Buffers]] = weakref.WeakKeyDictionary()


def make_static(cache: Cache, model: nn.Module, num_layers: int) -> None:
    """
    Turns the layers of a cache into `StaticSlotsLayer`s, without replacing the cache object itself.

    Args:
        cache (`Cache`): of `DynamicLayer`s, or empty.
        model (`nn.Module`): whose cache it is; buffers that it left are used again.
        num_layers (`int`): layers of the model.
    """
    spares: Sequence[Buffers | None] = _spare_buffers.pop(model, [])
    old: list[DynamicLayer | None] = [*cache.layers, *[None] * (num_layers - len(cache.layers))]
    if len(spares) != len(old):
        spares = [None] * len(old)
    cache.layers = [_static(layer, spare) for layer, spare in zip(old, spares, strict=True)]
    cache.layer_class_to_replicate = None


def leave_buffers(cache: Cache, model: nn.Module) -> None:
    """Keeps the buffers of a cache that nobody needs any more for the model's next call."""
    layers = [layer for layer in cache.layers if isinstance(layer, StaticSlotsLayer)]
    buffers = [layer.buffers for layer in layers if layer.buffers is not None]
    if layers and len(buffers) == len(layers):
        _spare_buffers[model] = buffers


@contextmanager
def buffers_left(wanted: bool, *caches: tuple[Cache, nn.Module]) -> Iterator[None]:
    """Leaves the buffers of caches to the next calls of their models when the block ends, however it does."""
    try:
        yield
    finally:
        if wanted:
            for cache, model in caches:
                leave_buffers(cache, model)


def _static(layer: DynamicLayer | None, spare: Buffers | None) -> StaticSlotsLayer:
    made = StaticSlotsLayer(spare)
    if layer is not None and layer.get_seq_length():
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
    return made


__all__ = [
    "StaticSlotsLayer",
    "buffers_left",
    "close_slots",
    "make_static",
    "move_slots",
    "parts_of",
    "reserve",
    "whole_buffers",
]
