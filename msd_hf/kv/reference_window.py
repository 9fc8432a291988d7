"""A cache layer with a sliding window that spares the prompt, as Unlimited-OCR has it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .in_place import InPlaceLayer, KeysAndValues


# The kind of layer, as transformers names it.
REFERENCE_WINDOW = "reference_sliding_attention"


class ReferenceWindowLayer(InPlaceLayer):
    """
    An `InPlaceLayer` that knows how many slots the prompt took. Every later token sees these, and a window of the slots
    behind them. The layer holds all slots; masks apply the window.

    Attributes:
        prefill_length (`int`, *optional*): slots of the prompt, `None` before the first update. The model reads it.
    """

    def __init__(self, max_slots: int | None = None, min_length: int = 0):
        super().__init__(max_slots, min_length)
        self.prefill_length: int | None = None
        # The model looks for its layers by this name. As an attribute of the class it would register the class.
        self._layer_type = REFERENCE_WINDOW

    def set_prefill_length(self, prefill_length: int) -> None:
        """Is told the length of a prompt before the forward, or the first of several forwards, over it."""
        if self.prefill_length is None:
            self.prefill_length = prefill_length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
        self.set_prefill_length(self.get_seq_length() + key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.prefill_length = None


def reference_window(layer: Any, max_slots: int) -> ReferenceWindowLayer:
    """Makes a `ReferenceWindowLayer` with the content of another layer. Slots that have left the window are filled with
    zeros, which masks hide."""
    lost = layer.get_seq_length() - sum(_held(layer)) if not isinstance(layer, ReferenceWindowLayer) else 0
    made = ReferenceWindowLayer(max_slots)
    made.prefill_length = layer.prefill_length
    if isinstance(layer, ReferenceWindowLayer):
        made.min_length = layer.min_length
        parts = [(layer.keys, layer.values)] if layer.get_seq_length() else []
    else:
        # A window that has lost slots cannot show them again.
        made.min_length = layer.get_seq_length() if lost else 0
        parts = [(layer.prefill_keys, layer.prefill_values)] if layer.prefill_cumulative_length else []
        if layer.cumulative_length:
            zeros = (states.new_zeros(*states.shape[:-2], lost, states.shape[-1]) for states in (layer.keys, layer.values))
            parts += [tuple(zeros), (layer.keys, layer.values)]  # type: ignore[list-item]
    if parts:
        keys, values = (torch.cat(states, dim=-2) for states in zip(*parts, strict=True))
        made.lazy_initialization(keys, values)
        made.keys, made.values = keys, values
    return made


def _held(layer: DynamicLayer) -> tuple[int, int]:
    """How many slots of the prompt and of the text behind it a layer of transformers holds."""
    prompt = layer.prefill_cumulative_length  # type: ignore[attr-defined]
    return prompt, layer.keys.shape[-2] if layer.cumulative_length else 0  # type: ignore[attr-defined]


def spared_slots(layers: list[Any]) -> int:
    """How many slots of a cache with these layers every token sees."""
    return max((layer.prefill_length or 0 for layer in layers if isinstance(layer, ReferenceWindowLayer)), default=0)


__all__ = ["REFERENCE_WINDOW", "ReferenceWindowLayer", "reference_window", "spared_slots"]
