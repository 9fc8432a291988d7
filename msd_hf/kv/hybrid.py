"""A cache layer with recurrent states and slots, for layers that run attention and a recurrence side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..recurrent.layer import RecurrentLayer
from .in_place import InPlaceLayer


class HybridLayer(InPlaceLayer, RecurrentLayer):
    """
    An `InPlaceLayer` and a `RecurrentLayer` in one. What concerns rows concerns slots and states.

    Args:
        number_of_states (`int`): as in `RecurrentLayer`.
        max_slots, min_length: as in `InPlaceLayer`.
    """

    def __init__(self, number_of_states: int = 1, max_slots: int | None = None, min_length: int = 0):
        InPlaceLayer.__init__(self, max_slots, min_length)
        RecurrentLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Slots are initialised with two positional arguments, states with named ones.
        (InPlaceLayer if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        RecurrentLayer.crop(self, *args, **kwargs)
        InPlaceLayer.crop(self, *args, **kwargs)

    def reset(self) -> None:
        RecurrentLayer.reset(self)
        InPlaceLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        RecurrentLayer.reorder_cache(self, beam_idx)
        InPlaceLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._keep_rows(indices.tolist())
        InPlaceLayer.batch_select_indices(self, indices)

    def select_rows(self, rows: Sequence[int], length: int) -> None:
        self._keep_rows(rows)
        if self.is_initialized:
            self.truncate(length)
            InPlaceLayer.batch_select_indices(self, torch.tensor(rows, device=self.device))

    def take_row(self, row: int, length: int) -> Any:
        return RecurrentLayer.take_row(self, row, length), InPlaceLayer.take_row(self, row, length)

    def put_rows(self, rows: Sequence[Any]) -> None:
        states, slots = zip(*rows, strict=True)
        RecurrentLayer.put_rows(self, states)
        InPlaceLayer.put_rows(self, slots)


__all__ = ["HybridLayer"]
