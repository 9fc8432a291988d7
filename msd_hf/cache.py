"""A KV cache layer that grows without copying what it holds, and that keeps accepted slots in place."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import ALL_CACHE_NAMES


# What this release of transformers calls the cache, in the arguments of a forward and in outputs: from 5.24 on it is
# `cache`, before it was `past_key_values`.
CACHE_NAME: str = ALL_CACHE_NAMES[0]

MIN_CAPACITY = 256


class InPlaceLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` (`[B, heads, slots, head_dim]`) are views of preallocated buffers.

    `DynamicLayer.update` concatenates, which copies the whole layer at every step. Here new slots are written behind
    the old ones, and a buffer that is full is replaced by one of twice the size. Everything else that `generate` does
    with a layer (crop, reorder, repeat) is inherited: it may replace `keys` by another tensor, which the next update
    takes over.

    Args:
        max_slots (`int`, *optional*): no more than this many slots are allocated ahead of need.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_slots: int | None = None):
        super().__init__()
        self.max_slots = max_slots
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or not self._shows_buffers() or end > self._buffers[0].shape[-2]:
            self._buffers = self._reserve(key_states, value_states, start, end)
        key_buffer, value_buffer = self._buffers
        key_buffer[:, :, start:end] = key_states
        value_buffer[:, :, start:end] = value_states
        self.keys, self.values = key_buffer[:, :, :end], value_buffer[:, :, :end]
        return self.keys, self.values

    def keep_slots(self, start: int, slots: torch.Tensor) -> None:
        """Keeps the slots before `start` and, of those from `start` on, only `slots` (`[B, A]`, counted from
        `start`), which move to `start, start + 1, ...`. The rest is dropped. Copies A slots."""
        end = start + slots.shape[1]
        index = slots[:, None, :, None]  # [B, 1, A, 1]
        for states in (self.keys, self.values):
            tail = states[:, :, start:]
            states[:, :, start:end] = tail.gather(2, index.expand(-1, tail.shape[1], -1, tail.shape[3]))
        self.truncate(end)

    def truncate(self, length: int) -> None:
        """Drops the slots from `length` on. Copies nothing."""
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def reset(self) -> None:
        super().reset()
        self._buffers = None

    def _shows_buffers(self) -> bool:
        """Whether `keys` and `values` still are views of the buffers, and not tensors that someone put there."""
        assert self._buffers is not None
        return all(
            view.shape[:-2] == buffer.shape[:-2] and view.data_ptr() == buffer.data_ptr()
            for view, buffer in zip((self.keys, self.values), self._buffers, strict=True)
        )

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, needed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = max(2 * needed, MIN_CAPACITY)
        if self.max_slots is not None:
            slots = max(min(slots, self.max_slots), needed)
        # Values may have another head size than keys.
        key_buffer = key_states.new_empty(*key_states.shape[:-2], slots, key_states.shape[-1])
        value_buffer = value_states.new_empty(*value_states.shape[:-2], slots, value_states.shape[-1])
        if held:
            key_buffer[:, :, :held] = self.keys
            value_buffer[:, :, :held] = self.values
        return key_buffer, value_buffer


def make_in_place(cache: DynamicCache, max_slots: int) -> None:
    """Turns the layers of an empty `DynamicCache` into `InPlaceLayer`s, without replacing the cache object itself."""
    cache.layers = [InPlaceLayer(max_slots) for _ in cache.layers]
    # A cache that was made without a config adds layers on first use.
    cache.layer_class_to_replicate = InPlaceLayer if cache.layer_class_to_replicate is not None else None


def keep_slots(cache: Cache, start: int, slots: torch.Tensor) -> None:
    """`InPlaceLayer.keep_slots` on every layer of a cache."""
    for layer in cache.layers:
        layer.keep_slots(start, slots.to(layer.device))


def truncate(cache: Cache, length: int) -> None:
    """`InPlaceLayer.truncate` on every layer of a cache."""
    for layer in cache.layers:
        layer.truncate(length)


__all__ = ["CACHE_NAME", "InPlaceLayer", "keep_slots", "make_in_place", "truncate"]
