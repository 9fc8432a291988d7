"""Configuration of a ViSpec draft."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..configuration_msd import MSDDraftConfig
from ..readings import OtherReadings, other_ropes


MOST_QUERIES = 1024
# Fields of an MSD draft that a ViSpec draft has in one way only.
_FIXED = {"decouple_visual_tokens": True, "global_image_vector": False, "target_layers": None}


@strict
class ViSpecDraftConfig(MSDDraftConfig):
    r"""
    Configuration of a [`ViSpecDraftModel`], the draft of *ViSpec* (arXiv 2509.15235).

    Args:
        num_queries (`int`, defaults to 2):
            Vectors that the adaptor makes of an image. All but the last are the rows that the draft reads of it.
        attention_bias (`bool`, defaults to `False`):
            Whether the query, key and value projections have biases, also those of the adaptor.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads:
            As in [`MSDDraftConfig`], whose other fields it also has. `decouple_visual_tokens`, `global_image_vector`
            and `target_layers` keep their defaults.
    """

    model_type = "vispec_draft"

    num_queries: int = 2

    def _check_parts(self) -> None:
        if not 2 <= self.num_queries <= MOST_QUERIES:
            raise ValueError(f"`num_queries` must be a number from 2 to {MOST_QUERIES}, got {self.num_queries}.")
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` must be {value} in a ViSpec draft, got {getattr(self, name)}.")

    def other_readings(self, target_config: PreTrainedConfig, num_layers: int) -> list[OtherReadings]:
        """Rotary settings: pictures are read in one way only."""
        return [other_ropes(self, target_config)]


__all__ = ["ViSpecDraftConfig"]
