"""Writes an EAGLE-3 draft in the formats that others read: the flat one of its authors, and that of speculators.

`conventions` reads both. A draft that means something for which a format has no place is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ...errors import MSDUnsupportedError
from ...writing.destination import FolderKind, read_config, replaced_folder
from ..translation import LLAMA_FIELDS
from .configuration import NUM_PARTS, Eagle3DraftConfig
from .conventions import AUX_IDS, IMAGE, OWN_LAYER, PLACEHOLDER
from .modeling import Eagle3DraftModel


FLAT, SPECULATORS = "eagle3-flat", "speculators"
_FLAT_ARCHITECTURE = "LlamaForCausalLMEagle3"
_SPECULATORS_VERSION = "0.9.0"  # of the package whose fields are written
_TOKENS = 5  # that its configuration proposes for a round
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def write_format(draft: Any, folder: str | Path, to: str, overwrite: bool = False) -> None:
    """
    Writes an EAGLE-3 draft as a folder with `config.json` and `model.safetensors` in another format.

    Args:
        draft (`Eagle3DraftModel`): the draft.
        folder (`str` or `Path`): where to write.
        to (`str`): `"eagle3-flat"`, or `"speculators"`.
        overwrite (`bool`, defaults to `False`): replace the folder, if it holds nothing but a draft in such a format.

    Raises:
        MSDUnsupportedError: when the format has no place for what the draft does.
        MSDError: when the folder may not be written.
    """
    check_format(draft, to)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in draft.state_dict().items()}
    if draft.draft_vocab is not None:
        weights["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
        weights["t2d"][draft.draft_vocab.cpu()] = True
    if to == FLAT and draft.config.num_hidden_layers == 1:
        weights = {name.replace("layers.0.", OWN_LAYER): weight for name, weight in weights.items()}
    dtype = str(draft.dtype).removeprefix("torch.")
    config = json.dumps(_FORMATS[to].fields(draft.config, dtype), indent=2, sort_keys=True)
    with replaced_folder(folder, FORMAT_FOLDER, overwrite) as temporary:
        save_file(weights, temporary / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")


def check_format(draft: Any, to: str) -> None:
    """
    Refuses a draft that means something for which a format has no place.

    Args:
        draft: the draft.
        to (`str`): argument of [`write_format`].

    Raises:
        MSDUnsupportedError: names the field.
    """
    reason = _reason(draft, to)
    if reason is not None:
        raise MSDUnsupportedError(f"The format {to!r} has no place for this draft: {reason}.")


def visual_positions_note(draft: Eagle3DraftModel, to: str) -> str | None:
    """A sentence for a draft that reads visual positions in another way than readers of the format; else `None`."""
    policy = draft.config.visual_positions
    is_narrow = draft.config.target_width != draft.config.hidden_size
    read = PLACEHOLDER if to == SPECULATORS or is_narrow else IMAGE
    if policy == read:
        return None
    return (
        f"The format has no field for visual positions: the draft was fed {policy!r} there, and AutoDraft reads this "
        f"folder as {read!r} unless visual_positions={policy!r} is given. The output does not depend on it."
    )


def _reason(draft: Any, to: str) -> str | None:
    if not isinstance(draft, Eagle3DraftModel):
        return f"a `{type(draft).__name__}` is no EAGLE-3 draft"
    config = draft.config
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; write the draft that was quantised"
    if config.visual_positions == "decoupled":
        return (
            '`visual_positions` is "decoupled", and engines that read the format feed the draft hidden states of the '
            "target at visual positions; train one with another value"
        )
    if config.num_parts != NUM_PARTS:
        return f"it reads {config.num_parts} hidden states of the target, and the format has {NUM_PARTS}"
    if config.fc_bias:
        return "its `fc` has a bias"
    if config.attention_bias:
        return "its queries, keys and values have biases (`attention_bias`), which there go with one of the output"
    if config.qk_norm and to == FLAT:
        return (
            "its queries and keys are normed (`qk_norm`), and the format has layers of LLaMA; 'speculators' has both"
        )
    if config.qk_norm and config.mlp_bias:
        return "its layers are those of Qwen3 (`qk_norm`), whose MLP has no biases (`mlp_bias`)"
    return None


def _rope(config: Eagle3DraftConfig) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def _flat_fields(config: Eagle3DraftConfig, dtype: str) -> dict[str, Any]:
    """LLaMA's configuration with the draft's own fields besides. Names are those from before transformers 5."""
    rope = _rope(config)
    theta, is_default = rope.pop("rope_theta"), rope["rope_type"] == "default"
    fields = {
        **_layer_fields(config),
        "architectures": [_FLAT_ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": dtype,
        "rope_theta": theta,
        "rope_scaling": None if is_default else rope,
        "draft_vocab_size": _num_rows(config),
        **{name: getattr(config, name) for name in _FLAGS},
    }
    if config.target_width != config.hidden_size:
        fields["target_hidden_size"] = config.target_width
    ids = config.eagle_aux_hidden_state_layer_ids
    if ids is not None:
        fields[AUX_IDS] = sorted(ids)  # vLLM and msd_hf read this entry first
        if min(ids) > 0:  # SGLang counts outputs of layers, and there is none of the embedding
            counted = [number - 1 for number in sorted(ids)]
            fields["eagle_config"] = {"use_aux_hidden_state": True, AUX_IDS: counted}
    return fields


def _speculators_fields(config: Eagle3DraftConfig, dtype: str) -> dict[str, Any]:
    layer = {
        **_layer_fields(config),
        "model_type": "qwen3" if config.qk_norm else "llama",
        "rope_parameters": _rope(config),
    }
    architecture = (config.target_fingerprint or {}).get("architecture")
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": _TOKENS,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "architectures": [Eagle3DraftModel.__name__],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "dtype": dtype,
        "draft_vocab_size": _num_rows(config),
        AUX_IDS: None
        if config.eagle_aux_hidden_state_layer_ids is None
        else sorted(config.eagle_aux_hidden_state_layer_ids),
        "target_hidden_size": None if config.target_width == config.hidden_size else config.target_width,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        **{name: getattr(config, name) for name in _FLAGS},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "architectures": [] if architecture is None else [architecture],
                "name_or_path": config.target_name_or_path,
            },
        },
        "transformer_layer_config": layer,
    }


def _layer_fields(config: Eagle3DraftConfig) -> dict[str, Any]:
    names = (*LLAMA_FIELDS, "attention_bias", "mlp_bias", "use_cache")
    return {**{name: getattr(config, name) for name in names}, "tie_word_embeddings": False}


def _num_rows(config: Eagle3DraftConfig) -> int:
    return config.vocab_size if config.draft_vocab_size is None else config.draft_vocab_size


class _Format(NamedTuple):
    fields: Callable[[Eagle3DraftConfig, str], dict[str, Any]]
    recognises: Callable[[Mapping[str, Any]], bool]


_FORMATS = {
    FLAT: _Format(_flat_fields, lambda config: config.get("architectures") == [_FLAT_ARCHITECTURE]),
    SPECULATORS: _Format(_speculators_fields, lambda config: config.get("speculators_model_type") == "eagle3"),
}
FORMATS = tuple(_FORMATS)


def _is_written(folder: Path) -> bool:
    config = read_config(folder)
    return any(one.recognises(config) for one in _FORMATS.values())


FORMAT_FOLDER = FolderKind(
    "an EAGLE-3 draft in another format", lambda path: path.name in (CONFIG_NAME, SAFE_WEIGHTS_NAME), _is_written
)


__all__ = ["FORMATS", "FORMAT_FOLDER", "check_format", "visual_positions_note", "write_format"]
