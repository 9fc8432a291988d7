"""Other values that fields of a draft's configuration might have been meant to have: the weights fit all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .translation import rope_of


_THETAS = (10000.0, 500000.0, 1000000.0, 5000000.0)  # of LLaMA 2, LLaMA 3, Qwen2 and Qwen3-VL


@dataclass(frozen=True)
class OtherReadings:
    """
    The other values of one field, the likeliest first.

    Args:
        field (`str`): name of the field.
        values (`list`): its other values.
        needs_image (`bool`, defaults to `False`): whether the field matters only with an image.
    """

    field: str
    values: list[Any]
    needs_image: bool = False


def other_ropes(config: PreTrainedConfig, target_config: PreTrainedConfig) -> OtherReadings:
    """
    Rotary settings that a draft may have been trained with: those of the target's decoder, and usual values of theta.

    Args:
        config: configuration of the draft.
        target_config: configuration of the target.
    """
    own: dict[str, Any] = dict(config.rope_parameters or {})
    fields = target_config.get_text_config(decoder=True).to_dict()
    of_target = fields.get("rope_parameters")
    is_one = isinstance(of_target, dict) and not any(isinstance(value, dict) for value in of_target.values())
    ropes = [rope_of(fields)] if is_one or of_target is None else []  # else each kind of layer has its own
    ropes += [{**own, "rope_theta": theta} for theta in _THETAS]
    if own.get("rope_type", "default") != "default":
        ropes.append({"rope_type": "default", "rope_theta": own["rope_theta"]})
    return OtherReadings("rope_parameters", others(own, ropes))


def others(present: Any, values: Iterable[Any]) -> list[Any]:
    """The values that differ from the present one and from each other, in order."""
    found: list[Any] = []
    for value in values:
        if value != present and value not in found:
            found.append(value)
    return found


__all__ = ["OtherReadings", "other_ropes", "others"]
