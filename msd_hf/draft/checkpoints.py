"""Checkpoints of the original MSD repository, read as drafts of this package.

An original checkpoint is a `config.json` with `model_type` `llava` or `qwen2_vl` and the fields of a LLaMA
configuration, and a `pytorch_model.bin` or `model.safetensors` with the keys `fc.*`, `layers.0.*` and a copy of the
target's embedding, `embed_tokens.weight`. The key names are those of `MSDDraftModel`, so only the configuration needs
translation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..errors import MSDCheckpointError
from .configuration_msd import MSDDraftConfig


# For each original `model_type`: the decoder's type, whether q/k/v have biases, whether the first layer has its norm.
_ORIGINAL_KINDS: dict[str, dict[str, Any]] = {
    "llava": {"target_text_model_type": "llama", "attention_bias": False, "input_layernorm": False},
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


# Arguments of `from_pretrained` that locate a file.
_LOCATION_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def read_original_config(name_or_path: str | Path, **kwargs: Any) -> MSDDraftConfig | None:
    """
    Reads the configuration of an original checkpoint from a folder or the Hub.

    Args:
        name_or_path (`str` or `Path`): folder, or repository id.
        kwargs: arguments of `from_pretrained`. Only arguments that locate a file are used.

    Returns:
        The configuration, or `None` if the checkpoint has the format of this package and needs no translation.

    Raises:
        MSDCheckpointError: when the checkpoint is not a draft.
        OSError: when there is no `config.json`.
    """
    location = {name: kwargs[name] for name in _LOCATION_ARGUMENTS if name in kwargs}
    config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **location)
    model_type = config_dict.get("model_type")
    if model_type == MSDDraftConfig.model_type:
        return None
    if model_type not in _ORIGINAL_KINDS:
        raise MSDCheckpointError(
            f"{str(name_or_path)!r} is not an MSD draft: its config.json has model_type {model_type!r}, expected "
            f"{MSDDraftConfig.model_type!r} or, for a checkpoint of the original repository, one of "
            f"{sorted(_ORIGINAL_KINDS)}."
        )
    return config_from_original(config_dict, source=str(name_or_path))


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
    if missing or original.get("num_hidden_layers", 1) > MAX_LAYERS:
        raise MSDCheckpointError(
            f"{source!r} has model_type {model_type!r} but is not a draft of the original MSD repository "
            + (
                f"(no {', '.join(missing)} in config.json)."
                if missing
                else f"({original['num_hidden_layers']} layers)."
            )
            + " Give the draft's folder or repository, not the target's."
        )
    fields = {name: original[name] for name in _LLAMA_FIELDS if original.get(name) is not None}
    # Original files may lack these fields. The original code then uses these defaults.
    fields.setdefault("num_hidden_layers", 1)
    fields.setdefault("rms_norm_eps", 1e-6)
    fields["rope_parameters"] = _rope_from_original(original)
    return MSDDraftConfig(**fields, target_model_type=model_type, **_ORIGINAL_KINDS[model_type])


def _rope_from_original(original: Mapping[str, Any]) -> dict[str, Any]:
    theta = original.get("rope_theta", 10000.0)
    scaling = original.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if scaling else None
    if not scaling or kind in (None, "default", "mrope"):  # the rows of M-RoPE are equal in the draft: 1-D positions
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": kind, "rope_theta": theta, **{k: v for k, v in scaling.items() if k != "type"}}


def check_loading_info(name_or_path: str | Path, loading_info: Mapping[str, Any]) -> None:
    """
    Turns the warnings of `from_pretrained` into an error, because a wrong weight is hard to notice: it only makes the
    draft slow.

    Raises:
        MSDCheckpointError: names every key that is missing, unexpected or of the wrong shape.
    """
    problems = [
        f"{what}: {', '.join(sorted(_name_of(key) for key in loading_info[name]))}"
        for what, name in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("of the wrong shape", "mismatched_keys"),
        )
        if loading_info.get(name)
    ]
    if problems:
        raise MSDCheckpointError(
            f"The weights in {str(name_or_path)!r} are not those of the draft that its config.json describes; "
            + "; ".join(problems)
            + "."
        )


def _name_of(key: str | tuple[Any, ...]) -> str:
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} ({list(found)}, expected {list(expected)})"


__all__ = ["check_loading_info", "config_from_original", "read_original_config"]
