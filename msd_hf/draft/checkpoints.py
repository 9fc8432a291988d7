"""Reads the configuration of a checkpoint, of this package or of the repositories that drafts are published from.

A checkpoint of the original MSD repository is a `config.json` with `model_type` `llava` or `qwen2_vl` and the fields
of a LLaMA configuration, and a `pytorch_model.bin` or `model.safetensors` with the keys `fc.*`, `layers.0.*` and a
copy of the target's embedding, `embed_tokens.weight`. The key names are those of `MSDDraftModel`, so only the
configuration needs translation. One of EAGLE-1 or EAGLE-2 has the same keys, one of ViSpec has an adaptor
besides, and one of EAGLE-3 has others (`eagle3.conventions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import CONFIG_NAME, logging

from ..errors import MSDCheckpointError, shown
from ..hub.known_drafts import target_of_original
from .configuration_msd import MSDDraftConfig
from .eagle3.configuration import Eagle3DraftConfig
from .eagle3.conventions import read_eagle3
from .files import errors_name_file, location_of, read_json, require_file
from .translation import LLAMA_FIELDS, rope_of
from .vispec.configuration import ViSpecDraftConfig
from .weights import StoredWeight, find_weight_files, read_headers


logger = logging.get_logger(__name__)

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
# Drafts of EAGLE-1 and EAGLE-2 have the model_type of their target's decoder. Their weights are those of an MSD draft.
_EAGLE_MODEL_TYPES = ("llama", "llava_next", "mistral", "mixtral", "qwen2", "qwen2_5_vl", "qwen3")
MAX_LAYERS = 4  # the published drafts have one layer; a target has dozens
_REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


# Values of a form that a user need not know.
_EXAMPLES = {"rope_parameters": '{"rope_type": "default", "rope_theta": ...}'}


class ReadDraft(NamedTuple):
    """
    What the files of a checkpoint say.

    Args:
        config (`PreTrainedConfig`): the configuration of the draft.
        is_published (`bool`): whether the checkpoint has another format than that of this package.
        key_mapping (`dict[str, str]`): regular expressions of names of weights, and the draft's names.
    """

    config: Any
    is_published: bool
    key_mapping: dict[str, str]


def read_config(name_or_path: str | Path, config_class: Any, overrides: Mapping[str, Any], **kwargs: Any) -> ReadDraft:
    """
    Reads the configuration of a draft from a folder or the Hub.

    Args:
        name_or_path (`str` or `Path`): folder, or repository id.
        config_class (`type`): class of the configuration that is expected.
        overrides (`Mapping`): fields of the configuration that replace those of the file.
        kwargs: arguments of `from_pretrained`. Only arguments that say where files are count.

    Raises:
        MSDCheckpointError: when the checkpoint is not a draft of this kind, or its configuration is damaged.
        OSError: when there is no `config.json`.
    """
    path = require_file(name_or_path, CONFIG_NAME, location_of(kwargs))
    fields = read_json(path)
    if fields.get("model_type") == config_class.model_type:
        return ReadDraft(config_class.from_dict(fields, name_or_path=str(path), **overrides), False, {})
    kind = kind_of(name_or_path, fields, kwargs)
    if kind is None and config_class is MSDDraftConfig and is_original(fields.get("model_type")):
        kind = "msd"  # `config_from_original` says what is wrong
    if kind is None or KINDS[kind].config_class is not config_class:
        raise MSDCheckpointError(_not_this_kind(name_or_path, fields, config_class, kind))
    with errors_name_file(path, "the configuration of a draft"):
        if kind == "eagle3":
            headers = weight_headers(name_or_path, kwargs)
            reading = read_eagle3(fields, headers, str(name_or_path), overrides)
            found, key_mapping = {**reading.fields, **overrides}, reading.key_mapping
            config = config_class(**found)  # as in any `from_pretrained`, fields may be overridden by name
            for name, doubt in reading.doubts.items():
                logger.warning(
                    f"{str(name_or_path)!r}: `{name}` {doubt}. The output does not depend on it; if the draft is "
                    f"slow, give another value to `from_pretrained` (`{name}={_EXAMPLES.get(name, '...')}`)."
                )
            return ReadDraft(config, True, key_mapping)
        if kind == "eagle":
            config = config_from_eagle(fields, weight_headers(name_or_path, kwargs))
        elif kind == "vispec":
            config = config_from_vispec(fields, weight_headers(name_or_path, kwargs))
        else:
            config = config_from_original(fields, source=str(path))
        config.target_name_or_path = target_of_original(str(name_or_path), fields)
        return ReadDraft(type(config)(**{**config.to_dict(), **overrides}), True, {})


def _not_this_kind(name_or_path: str | Path, fields: Mapping[str, Any], config_class: Any, kind: str | None) -> str:
    own = [name for name, one in KINDS.items() if one.config_class.model_type == fields.get("model_type")]
    kind = own[0] if own else kind
    expected = next(one.name for one in KINDS.values() if one.config_class is config_class)
    if kind is not None:
        return (
            f"{str(name_or_path)!r} is {KINDS[kind].name}, expected {expected}: `msd_hf.AutoDraft.from_pretrained` "
            "loads it with the class of its kind."
        )
    return (
        f"{str(name_or_path)!r} is not {expected}: its config.json has model_type {shown(fields.get('model_type'))}, "
        f"expected {config_class.model_type!r} or, for a checkpoint of the original repository, one of "
        f"{sorted(_ORIGINAL_KINDS)}, or weights of a published draft."
    )


class _Kind(NamedTuple):
    name: str
    config_class: Any


# The kinds of published checkpoints, and the classes that their drafts have here.
KINDS = {
    "msd": _Kind("an MSD draft", MSDDraftConfig),
    "eagle": _Kind("an EAGLE draft", MSDDraftConfig),
    "eagle3": _Kind("an EAGLE-3 draft", Eagle3DraftConfig),
    "vispec": _Kind("a ViSpec draft", ViSpecDraftConfig),
}


def kind_of(name_or_path: str | Path, fields: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str | None:
    """
    The kind of a published checkpoint, of [`KINDS`]: by its weights first, by its configuration second; `None` for
    another model. The weights of a model that is too large for a draft are not downloaded.

    Args:
        name_or_path (`str` or `Path`): folder, or repository id.
        fields (`Mapping`): its `config.json`.
        kwargs (`Mapping`): arguments of `from_pretrained`.

    Raises:
        MSDCheckpointError: when its files are damaged.
    """
    if not _may_be_draft(fields):
        return None
    names = {name: weight.shape for name, weight in weight_headers(name_or_path, kwargs).items()}
    if any(name.startswith("midlayer.") or name == "layers.0.hidden_norm.weight" for name in names):
        return "eagle3"
    if "imadpt.q" in names:
        return "vispec"
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        return None
    if is_original(model_type):
        return "msd"
    fc = names.get("fc.weight", ())
    is_fusion = len(fc) == 2 and fc[1] == 2 * fc[0] and "layers.0.self_attn.q_proj.weight" in names
    return "eagle" if is_fusion and model_type in _EAGLE_MODEL_TYPES else None


def is_original(model_type: Any) -> bool:
    """Whether drafts of the original MSD repository have this `model_type`, as whole targets have it, too."""
    return isinstance(model_type, str) and model_type in _ORIGINAL_KINDS


def _may_be_draft(fields: Mapping[str, Any]) -> bool:
    layer = fields.get("transformer_layer_config")
    layer = layer if isinstance(layer, Mapping) else fields
    num_layers = layer.get("num_hidden_layers", 1)
    return isinstance(num_layers, int) and num_layers <= MAX_LAYERS and layer.get("hidden_size") is not None


def weight_headers(name_or_path: str | Path, kwargs: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """Shape and dtype of the weights of a checkpoint; empty if there are none."""
    choice = {name: kwargs.get(name) for name in ("variant", "use_safetensors")}
    return read_headers(find_weight_files(name_or_path, location_of(kwargs), **choice))


def config_from_eagle(original: Mapping[str, Any], headers: Mapping[str, StoredWeight]) -> MSDDraftConfig:
    """
    Translates a checkpoint of EAGLE-1 or EAGLE-2, whose draft is that of MSD without decoupling.

    Args:
        original (`Mapping`): its `config.json`.
        headers (`Mapping`): shape and dtype of its weights.
    """
    return MSDDraftConfig(**_fusion_fields(original, headers), decouple_visual_tokens=False)


def config_from_vispec(original: Mapping[str, Any], headers: Mapping[str, StoredWeight]) -> ViSpecDraftConfig:
    """
    Translates a checkpoint of ViSpec, whose draft is that of EAGLE-1 with an adaptor for images. The number of its
    queries is in no configuration.

    Args:
        original (`Mapping`): its `config.json`.
        headers (`Mapping`): shape and dtype of its weights.

    Raises:
        ValueError: when `imadpt.q` is not three-dimensional.
    """
    shape = headers["imadpt.q"].shape
    if len(shape) != 3:
        raise ValueError(f"the weight `imadpt.q` has the shape {list(shape)}, expected [queries, heads, head_dim].")
    return ViSpecDraftConfig(**_fusion_fields(original, headers), num_queries=shape[0])


def _fusion_fields(original: Mapping[str, Any], headers: Mapping[str, StoredWeight]) -> dict[str, Any]:
    """The fields of a draft with the layers of EAGLE-1."""
    fields = {name: original[name] for name in LLAMA_FIELDS if original.get(name) is not None}
    fields.setdefault("rms_norm_eps", 1e-6)
    numbers = [int(name.split(".")[1]) for name in headers if name.startswith("layers.")]
    return fields | {
        "num_hidden_layers": max(numbers, default=0) + 1,
        "rope_parameters": rope_of(original),
        "attention_bias": "layers.0.self_attn.q_proj.bias" in headers,
        "input_layernorm": "layers.0.input_layernorm.weight" in headers,
        "fc_bias": "fc.bias" in headers,
    }


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
    fields = {name: original[name] for name in LLAMA_FIELDS if original.get(name) is not None}
    # Original files may lack these fields. The original code then uses these defaults.
    fields.setdefault("num_hidden_layers", 1)
    fields.setdefault("rms_norm_eps", 1e-6)
    with errors_name_file(source, "the configuration of a draft"):
        fields["rope_parameters"] = rope_of(original)
        return MSDDraftConfig(**fields, target_model_type=model_type, **_ORIGINAL_KINDS[model_type])


__all__ = ["KINDS", "ReadDraft", "config_from_original", "is_original", "kind_of", "read_config", "weight_headers"]
