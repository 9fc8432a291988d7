"""Fields of other configurations that those of drafts have by the same name or in another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_MULTIMODAL_KEYS = ("mrope_section", "mrope_interleaved")


def rope_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    The rotary settings of a LLaMA layer, from a configuration of any release of transformers. Without a `rope_theta`
    it is 10000, as in the code that such files were written for.

    Raises:
        ValueError: when the settings are no object.
    """
    given = fields.get("rope_parameters")
    name = "rope_scaling" if given is None else "rope_parameters"
    scaling = fields.get("rope_scaling") if given is None else given
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"`{name}` must be an object, got a {type(scaling).__name__}.")
    scaling = dict(scaling or {})
    kind = scaling.pop("rope_type", scaling.pop("type", None))
    theta = scaling.pop("rope_theta", fields.get("rope_theta", 10000.0))
    if kind in (None, "default", "mrope"):  # the rows of M-RoPE are equal in the draft: 1-D positions
        return {"rope_type": "default", "rope_theta": theta}
    others = {key: value for key, value in scaling.items() if key not in ("type", *_MULTIMODAL_KEYS)}
    return {"rope_type": kind, "rope_theta": theta, **others}


__all__ = ["LLAMA_FIELDS", "rope_of"]
