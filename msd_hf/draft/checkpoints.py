"""Reads the configuration of a checkpoint, of this package or of the original MSD repository.

An original checkpoint is a `config.json` with `model_type` `llava` or `qwen2_vl` and the fields of a LLaMA
configuration, and a `pytorch_model.bin` or `model.safetensors` with the keys `fc.*`, `layers.0.*` and a copy of the
target's embedding, `embed_tokens.weight`. The key names are those of `MSDDraftModel`, so only the configuration needs
translation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..errors import MSDCheckpointError, shown
from ..hub.known_drafts import target_of_original
from .configuration_msd import MSDDraftConfig
from .files import errors_name_file, location_of, read_json, require_file


# For each original `model_type`: the decoder's type, whether q/k/v have biases, whether the first layer has its norm,
# and how many visual positions a training sample had, if that is known: one picture of LLaVA-1.5 has 24 x 24. Pictures
# of Qwen2-VL have any size.
_ORIGINAL_KINDS: dict[str, dict[str, Any]] = {
    "llava": {
        "target_text_model_type": "llama",
        "attention_bias": False,
        "input_layernorm": False,
        "trained_visual_rows": 576,
    },
    "qwen2_vl": {"target_text_model_type": "qwen2_vl_text", "attention_bias": True, "input_layernorm": True},
}
_LLAMA_FIELDS = (
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
MAX_LAYERS = 4  # the published drafts have one layer; a target has dozens
_REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


def read_config(
    name_or_path: str | Path, config_class: type[MSDDraftConfig], overrides: Mapping[str, Any], **kwargs: Any
) -> tuple[MSDDraftConfig, bool]:
    """
    Reads the configuration of a draft from a folder or the Hub.

    Args:
        name_or_path (`str` or `Path`): folder, or repository id.
        config_class (`type`): class of the configuration, if the checkpoint has the format of this package.
        overrides (`Mapping`): fields of the configuration that replace those of the file.
        kwargs: arguments of `from_pretrained`. Only arguments that say where files are count.

    Returns:
        The configuration, and whether the checkpoint has the format of the original repository.

    Raises:
        MSDCheckpointError: when the checkpoint is not a draft, or its configuration is damaged.
        OSError: when there is no `config.json`.
    """
    path = require_file(name_or_path, CONFIG_NAME, location_of(kwargs))
    fields = read_json(path)
    model_type = fields.get("model_type")
    if model_type == config_class.model_type:
        return config_class.from_dict(fields, name_or_path=str(path), **overrides), False
    if not isinstance(model_type, str) or model_type not in _ORIGINAL_KINDS:
        raise MSDCheckpointError(
            f"{str(name_or_path)!r} is not an MSD draft: its config.json has model_type {shown(model_type)}, "
            f"expected {config_class.model_type!r} or, for a checkpoint of the original repository, one of "
            f"{sorted(_ORIGINAL_KINDS)}."
        )
    config = config_from_original(fields, source=str(path))
    config.target_name_or_path = target_of_original(str(name_or_path), fields)
    with errors_name_file(path, "the configuration of a draft"):
        # As in any `from_pretrained`, a field of the configuration may be overridden by name.
        return type(config)(**{**config.to_dict(), **overrides}), True


def config_from_original(original: Mapping[str, Any], source: str = "config.json") -> MSDDraftConfig:
    """
    Translates the `config.json` of an original checkpoint.

    Args:
        original (`Mapping`): the parsed `config.json`.
        source (`str`): name of the file in an error message.

    Raises:
        MSDCheckpointError: when the file does not describe an original draft, or lacks a required field.
    """
    model_type = original.get("model_type")
    if model_type not in _ORIGINAL_KINDS:
        raise MSDCheckpointError(f"{source!r}: model_type {model_type!r} is none of {sorted(_ORIGINAL_KINDS)}.")
    # A whole LLaVA or Qwen2-VL has the same model_type, but its config.json has no decoder fields at the top level.
    missing = [name for name in _REQUIRED_FIELDS if original.get(name) is None]
    num_layers = original.get("num_hidden_layers")
    is_deep = isinstance(num_layers, int) and num_layers > MAX_LAYERS
    if missing or is_deep:
        raise MSDCheckpointError(
            f"{source!r} has model_type {model_type!r} but is not a draft of the original MSD repository "
            + (
                f"(no {', '.join(missing)} in config.json)."
                if missing
                else f"(`num_hidden_layers` is {shown(num_layers)}, at most {MAX_LAYERS})."
            )
            + " Give the draft's folder or repository, not the target's."
        )
    fields = {name: original[name] for name in _LLAMA_FIELDS if original.get(name) is not None}
    # Original files may lack these fields. The original code then uses these defaults.
    fields.setdefault("num_hidden_layers", 1)
    fields.setdefault("rms_norm_eps", 1e-6)
    with errors_name_file(source, "the configuration of a draft"):
        fields["rope_parameters"] = _rope_from_original(original)
        return MSDDraftConfig(**fields, target_model_type=model_type, **_ORIGINAL_KINDS[model_type])


def _rope_from_original(original: Mapping[str, Any]) -> dict[str, Any]:
    theta = original.get("rope_theta", 10000.0)
    scaling = original.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"`rope_scaling` must be an object, got a {type(scaling).__name__}.")
    kind = scaling.get("rope_type", scaling.get("type")) if scaling else None
    if not scaling or kind in (None, "default", "mrope"):  # the rows of M-RoPE are equal in the draft: 1-D positions
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": kind, "rope_theta": theta, **{k: v for k, v in scaling.items() if k != "type"}}


__all__ = ["config_from_original", "read_config"]
