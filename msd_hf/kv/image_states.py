"""A cache layer with the states of images, which a cross-attention layer reads for every token of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .in_place import KeysAndValues


class ImageStatesLayer(DynamicLayer):
    """
    A layer whose slots hold states of images. They come with a prompt, and blocks of text pass them over: nothing is
    moved or dropped with the text. Only the block that brought them takes them along if it is dropped.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.min_length = 0
        self._text_length = 0  # slots of text before the block that is open
        self._came: list[tuple[int, int]] = []  # for each update: slots of text before its block, states before it

    def begin(self, text_length: int) -> None:
        """Notes the number of slots of text before the next block."""
        self._text_length = text_length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
        self._came.append((self._text_length, self.get_seq_length()))
        return super().update(key_states, value_states, *args, **kwargs)

    def truncate(self, length: int) -> None:
        """Drops the states that came with blocks of text behind the first `length` slots of text."""
        while self._came and self._came[-1][0] >= length:
            _, before = self._came.pop()
            if before:
                self.keys, self.values = self.keys[:, :, :before], self.values[:, :, :before]
            else:
                self.lazy_initialization(self.keys, self.values)  # holds nothing, of no batch size

    def keep_slots(self, start: int, slots: torch.Tensor) -> None:
        """Nothing: see the class."""

    def move_slots(self, start: int, slots: torch.Tensor, places: torch.Tensor, length: int) -> None:
        """Nothing: see the class."""

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a crop counts slots of text."""

    def reset(self) -> None:
        super().reset()
        self._came = []

    def select_rows(self, rows: Sequence[int], length: int) -> None:
        """Keeps the given rows of the batch, in that order."""
        if self.is_initialized:
            self.batch_select_indices(torch.tensor(rows, device=self.device))

    def take_row(self, row: int, length: int) -> KeysAndValues:
        """Copies of the keys and values of a row."""
        if not self.is_initialized:
            return torch.empty(0), torch.empty(0)
        return self.keys[row : row + 1].clone(), self.values[row : row + 1].clone()

    def put_rows(self, rows: Sequence[KeysAndValues]) -> None:
        """Replaces the content of the layer by rows that `take_row` returned."""
        if self.is_initialized:
            self.keys, self.values = (torch.cat([row[kind] for row in rows]) for kind in (0, 1))


def image_states(layer: DynamicLayer | None) -> ImageStatesLayer:
    """Makes an `ImageStatesLayer` with the content of another layer."""
    made = ImageStatesLayer()
    if layer is not None and layer.get_seq_length():
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
    return made


__all__ = ["ImageStatesLayer", "image_states"]
