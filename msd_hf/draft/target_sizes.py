"""What a new draft takes from its target: the model whose `generate` it serves, the sizes of its layer, its positions.

The draft's layer is a plain attention layer also where the target's layers are none, so every size has a default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ..errors import MSDError


# Sizes that can differ between the layers of a target.
_LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
# The MLP's width in configurations without `intermediate_size`.
_MLP_WIDTHS = ("ffn_dim", "ffn_hidden_size", "n_inner")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_DEFAULT_HEAD_DIM = 64
_DEFAULT_ROPE_THETA = 10000.0
# Rotary settings for multi-dimensional positions. The positions of a draft have one dimension.
_MULTIMODAL_ROPE_KEYS = ("mrope_section", "mrope_interleaved")


def generating_model(target: PreTrainedModel) -> PreTrainedModel:
    """The model whose `generate` decodes for a target: the target itself, or the language model inside of it to which
    its own `generate` hands the call on, as in BLIP-2."""
    if type(target).generate is GenerationMixin.generate:
        return target
    inner = [
        module for module in target.children() if isinstance(module, PreTrainedModel) and type(module).can_generate()
    ]
    return inner[0] if len(inner) == 1 else target


def draft_fields(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """
    The fields of a draft's configuration that follow from the target's decoder.

    Args:
        config (`PreTrainedConfig`): configuration of the target.
        overrides (`Mapping[str, Any]`): fields that are given, and on which others may depend.

    Raises:
        MSDError: when a required field is neither in the configuration of the decoder nor given.
    """
    text_config, number = _typical_layer(config.get_text_config(decoder=True))
    required = ("vocab_size", "hidden_size")
    fields = {name: getattr(text_config, name, None) for name in required}
    missing = [name for name in required if fields[name] is None and overrides.get(name) is None]
    if missing:
        raise MSDError(
            f"Cannot derive a draft from a `{type(config).__name__}`: its decoder configuration "
            f"(`{type(text_config).__name__}`) has no {', '.join(missing)}. Give what is missing as an argument."
        )
    copied = ("initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id")
    fields |= {name: getattr(text_config, name, None) for name in copied}
    fields["max_position_embeddings"] = _of_layer(text_config, "max_position_embeddings", 0)
    sizes = {name: _of_layer(text_config, name, number) for name in _LAYER_SIZES}
    fields |= _heads({**sizes, **fields, **overrides})
    fields["intermediate_size"] = sizes["intermediate_size"] or _mlp_width(text_config, {**fields, **overrides})
    # As in the published drafts: Qwen2 layers unchanged, LLaMA layers without the first norm.
    is_qwen2_kind = text_config.model_type.startswith("qwen2")
    # Gemma's name comes first: a configuration with both names uses this one.
    activations = (getattr(text_config, name, None) for name in ("hidden_activation", "hidden_act"))
    fields |= {
        "attention_bias": is_qwen2_kind,
        "input_layernorm": is_qwen2_kind,
        "target_model_type": config.model_type,
        "target_text_model_type": text_config.model_type,
        "rope_parameters": _one_dimensional_rope(text_config),
        "hidden_act": next((name for name in activations if isinstance(name, str) and name in ACT2FN), "silu"),
    }
    return {name: value for name, value in {**fields, **overrides}.items() if value is not None or name in overrides}


def _typical_layer(text_config: PreTrainedConfig) -> tuple[PreTrainedConfig, int]:
    """The configuration of the first layer whose sizes most layers have, and the number of this layer. It has all
    other fields, too. A configuration with sizes by layer lets nobody read them as those of the whole model."""
    if getattr(text_config, "is_heterogeneous", False):
        layers = list(text_config.per_layer_config)
    else:
        lists = (getattr(text_config, name, None) for name in _LAYER_SIZES)
        layers = [text_config] * max(len(sizes) if isinstance(sizes, list | tuple) else 1 for sizes in lists)
    sizes = [tuple(_of_layer(layer, name, number) for name in _LAYER_SIZES) for number, layer in enumerate(layers)]
    number = sizes.index(Counter(sizes).most_common(1)[0][0])
    return layers[number], number


def _of_layer(config: PreTrainedConfig, name: str, number: int) -> int | None:
    """A size of one layer; `None` if there is none. Some configurations have a list with one size for each layer."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple):
        value = value[number] if number < len(value) else None
    return value if isinstance(value, int) and value > 0 else None


def _first_size(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    return next((size for size in (_of_layer(config, name, 0) for name in names) if size is not None), None)


def _heads(known: Mapping[str, Any]) -> dict[str, Any]:
    """Number and width of attention heads that fit together, for targets that lack them or whose layers differ."""
    hidden_size = known["hidden_size"]
    num_heads, head_dim = known["num_attention_heads"], known["head_dim"]
    if num_heads is None:
        num_heads = max(hidden_size // (head_dim or _DEFAULT_HEAD_DIM), 1)
    if head_dim is None:
        head_dim = hidden_size // num_heads
        head_dim += head_dim % 2  # rotary positions turn pairs
    num_kv_heads = known["num_key_value_heads"]
    if num_kv_heads is not None and num_heads % num_kv_heads:
        num_kv_heads = None
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}


def _mlp_width(text_config: PreTrainedConfig, known: Mapping[str, Any]) -> int:
    """The width of the draft's MLP where the target has no `intermediate_size`: the target's own name for it, the sum
    of the experts that a token is given to, or four times the hidden size."""
    width = _first_size(text_config, _MLP_WIDTHS)
    if width is not None:
        return width
    of_expert, num_active = _first_size(text_config, ("moe_intermediate_size",)), None
    if of_expert is not None:
        num_active = _first_size(text_config, _ACTIVE_EXPERTS)
    if of_expert is None or num_active is None:
        return 4 * known["hidden_size"]
    shared = _first_size(text_config, ("shared_expert_intermediate_size",))
    if shared is None:
        shared = of_expert * (_first_size(text_config, _SHARED_EXPERTS) or 0)
    return of_expert * num_active + shared


def _one_dimensional_rope(text_config: PreTrainedConfig) -> dict[str, Any] | None:
    """The target's rotary settings with scaling, for a draft with one-dimensional positions and full attention."""
    rope = getattr(text_config, "rope_parameters", None)
    if not rope:
        return None
    by_kind = {kind: settings for kind, settings in rope.items() if isinstance(settings, dict)}
    if by_kind:  # one entry per layer type
        rope = by_kind.get("full_attention") or next(iter(by_kind.values()))
    rope = {key: value for key, value in rope.items() if key not in _MULTIMODAL_ROPE_KEYS}
    # The draft's layers rotate whole heads, so a scaling that was made for a part of a head does not fit them.
    partial = rope.pop("partial_rotary_factor", None) or getattr(text_config, "partial_rotary_factor", None)
    if rope.get("rope_type") in (None, "mrope") or partial not in (None, 1.0):
        return {"rope_type": "default", "rope_theta": rope.get("rope_theta") or _DEFAULT_ROPE_THETA}
    return rope


__all__ = ["draft_fields", "generating_model"]
