"""A cache layer with the keys of an indexer, which chooses the slots that attention reads.

Models with sparse attention of the DeepSeek kind keep, besides keys and values, one small key for each slot, and so
does MiniMax M3, whose indexer chooses blocks of slots. These keys belong to the slots as keys and values do: they
move, go and change their rows with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .in_place import InPlaceLayer, KeysAndValues, length_at_least, take_content


# The kind of layer whose indexer chooses blocks of slots, as transformers names it.
BLOCK_INDEXED = "minimax_m3_sparse"


class InPlaceIndexedLayer(InPlaceLayer):
    """
    An `InPlaceLayer` that also holds the keys of an indexer, `[B, slots, D]`, and optionally the positions of all
    slots, `[P, B, slots]`, as `DynamicIndexedLayer` of transformers does. It has the names of MiniMax M3's layer too.

    Args:
        max_slots, min_length: as for `InPlaceLayer`.

    Attributes:
        index (`InPlaceLayer`): the keys of the indexer as keys of one head, with empty values.
        indexer_position_ids (`torch.Tensor`, *optional*): set by the model.
    """

    def __init__(self, max_slots: int | None = None, min_length: int = 0):
        super().__init__(max_slots, min_length)
        self.index = InPlaceLayer(max_slots)
        self.indexer_position_ids: torch.Tensor | None = None

    @property
    def is_indexer_initialized(self) -> bool:
        return self.index.is_initialized

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        return self.index.keys.squeeze(1) if self.index.get_seq_length() else None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Appends keys of the indexer `[B, T, D]`. Returns all, `[B, slots, D]`."""
        states = indexer_key_states.unsqueeze(1)
        return self.index.update(states, states.new_empty(*states.shape[:-1], 0))[0].squeeze(1)

    @property
    def idx_keys(self) -> torch.Tensor | None:
        """The keys of the indexer as MiniMax M3 has them, `[B, 1, slots, D]`."""
        return self.index.keys if self.index.get_seq_length() else None

    def update_index(self, idx_k: torch.Tensor) -> torch.Tensor:
        """Appends keys of the indexer `[B, 1, T, D]`. Returns all, `[B, 1, slots, D]`."""
        return self.update_indexer(idx_k.squeeze(1)).unsqueeze(1)

    # In the methods below the keys of the indexer come first, because the inherited method truncates all.

    def keep_slots(self, start: int, slots: torch.Tensor) -> None:
        self.index.keep_slots(start, slots)
        positions = self.indexer_position_ids
        if positions is not None:
            chosen = (slots.to(positions.device) + start).expand(*positions.shape[:-1], -1)
            self.indexer_position_ids = torch.cat([positions[..., :start], positions.gather(-1, chosen)], dim=-1)
        super().keep_slots(start, slots)

    def move_slots(self, start: int, slots: torch.Tensor, places: torch.Tensor, length: int) -> None:
        self.index.move_slots(start, slots, places, length)
        positions = self.indexer_position_ids
        if positions is not None:
            chosen, target = (
                which.to(positions.device).expand(*positions.shape[:-1], -1) for which in (slots + start, places)
            )
            self.indexer_position_ids = positions.scatter(-1, target, positions.gather(-1, chosen))
        super().move_slots(start, slots, places, length)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.index.truncate(length)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :length]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # may refuse
        self.truncate(self.get_seq_length())

    def take_row(self, row: int, length: int) -> Any:
        """What `put_rows` needs of a row: keys and values, keys of the indexer, and positions `[P, length]`."""
        positions = self.indexer_position_ids
        if positions is not None:
            positions = positions[:, row, :length].clone()
        return super().take_row(row, length), self.index.take_row(row, length), positions

    def put_rows(self, rows: Sequence[Any]) -> None:
        states: list[KeysAndValues] = [row[0] for row in rows]
        super().put_rows(states)
        self.index.put_rows([row[1] for row in rows])
        if self.indexer_position_ids is not None:
            padded = pad_sequence([row[2].T for row in rows], batch_first=True)  # [B, slots, P]
            self.indexer_position_ids = padded.permute(2, 0, 1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.index.batch_repeat_interleave(repeats)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids.repeat_interleave(repeats, dim=1)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.index.batch_select_indices(indices)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[:, indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.index.reorder_cache(beam_idx)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[:, beam_idx]

    def reset(self) -> None:
        super().reset()
        self.index.reset()
        self.indexer_position_ids = None


def indexed_in_place(layer: Any, max_slots: int) -> InPlaceIndexedLayer:
    """Makes an `InPlaceIndexedLayer` with the content of another layer with an indexer."""
    made = InPlaceIndexedLayer(max_slots, length_at_least(layer))
    take_content(made, layer)
    keys = index_keys(layer)
    if keys is not None and keys.numel():
        made.update_indexer(keys)
    made.indexer_position_ids = getattr(layer, "indexer_position_ids", None)
    return made


def has_index(layer: Any) -> bool:
    """Whether a layer of a cache holds the keys of an indexer."""
    return hasattr(layer, "update_indexer") or hasattr(layer, "update_index")


def index_keys(layer: Any) -> torch.Tensor | None:
    """The keys `[B, slots, D]` of a layer's indexer; `None` if it holds none."""
    if hasattr(layer, "indexer_keys"):
        return layer.indexer_keys
    keys = getattr(layer, "idx_keys", None)
    return None if keys is None else keys.squeeze(1)


def add_index_keys(layer: Any, keys: torch.Tensor) -> None:
    """Appends keys `[B, T, D]` of a layer's indexer."""
    if hasattr(layer, "update_indexer"):
        layer.update_indexer(keys)
    else:
        layer.update_index(keys.unsqueeze(1))


__all__ = ["BLOCK_INDEXED", "InPlaceIndexedLayer", "add_index_keys", "has_index", "index_keys", "indexed_in_place"]
