"""A cache layer with a sliding window that spares the prompt, as Unlimited-OCR has it."""

from __future__ import annotations

from typing import Any

import torch

from .in_place import InPlaceLayer, KeysAndValues, take_content


# The kind of layer, as transformers names it.
REFERENCE_WINDOW = "reference_sliding_attention"


class ReferenceWindowLayer(InPlaceLayer):
    """
    An `InPlaceLayer` that knows how many slots the prompt took. Every later token sees these, and a window of the
    slots behind them. The layer holds all slots; masks apply the window.

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
    """Makes a `ReferenceWindowLayer` with the content of another layer. Slots that have left the window become zeros,
    which masks hide, and the layer cannot be cropped back to where they would be seen."""
    made = ReferenceWindowLayer(max_slots)
    if isinstance(layer, ReferenceWindowLayer):
        take_content(made, layer)
    elif layer.get_seq_length():
        prompt, window = (layer.prefill_keys, layer.prefill_values), (layer.keys, layer.values)
        if not layer.cumulative_length:  # what stands there has no shape yet
            window = tuple(states[:, :, :0] for states in prompt)
        num_lost = layer.cumulative_length - window[0].shape[2]
        keys, values = (
            torch.cat([first, first.new_zeros(*first.shape[:2], num_lost, first.shape[3]), last], dim=2)
            for first, last in zip(prompt, window, strict=True)
        )
        made.lazy_initialization(keys, values)
        made.keys, made.values = keys, values
        made.min_length = layer.get_seq_length() if num_lost else 0
    made.prefill_length = layer.prefill_length
    return made


def spared_slots(layers: list[Any]) -> int:
    """How many slots of a cache with these layers every token sees."""
    return max((getattr(layer, "prefill_length", None) or 0 for layer in layers), default=0)


__all__ = ["REFERENCE_WINDOW", "ReferenceWindowLayer", "reference_window", "spared_slots"]
