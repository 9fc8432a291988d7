"""Which targets can be served: kinds of models, layers and attention, and whether a draft fits the target."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..decoders import decoder_of, head_of
from ..draft.base import LENGTH_DEPENDENT_ROPE
from ..draft.interface import register_target_check
from ..errors import MSDPairingError, MSDUnsupportedError
from ..recurrent.kernels import has_known_kernels
from ..recurrent.replay import mixers_of
from ..tree.settings import TreeSettings
from .compiled_parts import uncompiled
from .layer_kinds import (
    KEEPS_STATES,
    SERVED_LAYERS,
    attention_reaches,
    has_recurrent_layers,
    image_layers,
    recurrent_layers,
    why_unserved,
)


# Attention implementations that take an additive mask. For a target with another one, trees are verified with sdpa.
TREE_ATTENTION = ("sdpa", "eager")

# Kinds of targets for which tests show that trees are verified correctly. Other kinds are checked at the first call.
KNOWN_MODEL_TYPES = frozenset(
    {
        "axk2",
        "aya_vision",
        "bamba",
        "deepseek_v32",
        "falcon_h1",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "glm_moe_dsa",
        "granitemoehybrid",
        "hy_v4",
        "idefics3",
        "internvl",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm2_vl",
        "llama",
        "llama4_text",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral",
        "mistral3",
        "mistral_large4",
        "mllama",
        "nemotron_h",
        "olmo_hybrid",
        "paligemma",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_next",
        "qwen3_vl",
        "smolvlm",
        "vipllava",
        "zamba2",
    }
)


def decoder_inputs(decoder: nn.Module) -> list[str]:
    """The names of the inputs of a decoder's forward, in order."""
    return list(inspect.signature(uncompiled(decoder).forward).parameters)


def takes_any_argument(decoder: nn.Module) -> bool:
    """Whether a decoder's forward passes unknown arguments on to its attention."""
    parameters = inspect.signature(uncompiled(decoder).forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def check_target(target: PreTrainedModel | PreTrainedConfig) -> None:
    """
    Refuses targets that the decoding loop cannot serve.

    Args:
        target (`PreTrainedModel` or `PreTrainedConfig`): the target. Of a configuration, only its kind and the kinds
            of its layers are checked.

    Raises:
        MSDUnsupportedError: names the target's kind or its layers, and what to do.
    """
    config = target if isinstance(target, PreTrainedConfig) else target.config
    name = f"`{type(target).__name__}` (model_type {config.model_type!r})"
    advice = "Call `generate` without `assistant_model`."
    if config.is_encoder_decoder:
        raise MSDUnsupportedError(f"{name} is an encoder-decoder model, of which MSD drafts know nothing. {advice}")
    if not isinstance(target, PreTrainedConfig):
        _check_modules(target, name, advice)
    _check_layers(target, config.get_text_config(decoder=True), name, advice)


def _check_modules(target: PreTrainedModel, name: str, advice: str) -> None:
    """The part of `check_target` that needs the model."""
    if head_of(target) is None or decoder_of(target) is target:
        raise MSDUnsupportedError(
            f"{name} has no decoder (`get_decoder()`) with a language-model head (`get_output_embeddings()`) behind "
            f"it, which MSD drafts read and use. {advice}"
        )
    if "position_ids" not in decoder_inputs(decoder_of(target)):
        raise MSDUnsupportedError(
            f"The decoder of {name} takes no `position_ids`, so that siblings in a candidate tree cannot stand at the "
            f"same position. {advice}"
        )
    if not {"cache", "past_key_values"} & set(decoder_inputs(decoder_of(target))):
        raise MSDUnsupportedError(
            f"The decoder of {name} takes no cache of keys and values, against which candidates are verified. {advice}"
        )
    text_config = target.config.get_text_config(decoder=True)
    if not target._supports_default_dynamic_cache():
        raise MSDUnsupportedError(
            f"{name} keeps its states in a cache of its own kind; an MSD draft moves the slots of a `DynamicCache`. "
            f"{advice}"
        )
    decoder, numbers = decoder_of(target), recurrent_layers(text_config)
    # Layers of an unknown kind are tried in chains, see `recurrent/replay.py`.
    if numbers and KEEPS_STATES and not has_known_kernels(decoder) and not mixers_of(decoder, numbers):
        raise MSDUnsupportedError(
            f"The recurrent layers of {name} keep their states in their modules, where they cannot follow a candidate "
            f"tree or chain. {advice}"
        )
    takes_states = "cross_attention_states" in decoder_inputs(decoder_of(target))
    layers = image_layers(text_config)
    if (takes_states and (not layers or 0 in layers)) or getattr(text_config, "add_cross_attention", False):
        raise MSDUnsupportedError(
            f"The decoder of {name} has cross-attention in its first layer, by whose slots in the cache a text is "
            f"counted, or in layers that its configuration does not list in `cross_attention_layers`. {advice}"
        )
    _check_adapters(target, name, advice)
    embedding_size = getattr(target.get_input_embeddings(), "embedding_dim", text_config.hidden_size)
    if embedding_size != text_config.hidden_size:
        raise MSDUnsupportedError(
            f"The embeddings of {name} have {embedding_size} dimensions and its hidden states "
            f"{text_config.hidden_size}: an MSD draft reads both as one size. {advice}"
        )
    is_indexed = getattr(text_config, "index_topk", None) is not None
    if is_indexed and any("_cached_keys" in module._buffers for module in decoder_of(target).modules()):
        raise MSDUnsupportedError(
            f"The decoder of {name} keeps keys of its indexers in its modules, where they cannot follow a candidate "
            f"tree; later releases of transformers keep them in the cache. {advice}"
        )


def _check_layers(
    target: PreTrainedModel | PreTrainedConfig, text_config: PreTrainedConfig, name: str, advice: str
) -> None:
    others = sorted(attention_reaches(text_config).keys() - SERVED_LAYERS)
    if others:
        reason = why_unserved(others[0])
        kinds = ", ".join(kind for kind in others if why_unserved(kind) == reason)
        raise MSDUnsupportedError(f"The decoder of {name} has layers of type {kinds}, which {reason}. {advice}")
    if getattr(target, "_is_stateful", False) and not has_recurrent_layers(text_config):
        raise MSDUnsupportedError(
            f"The decoder of {name} has a recurrent state outside of the cache, which cannot keep one branch of a "
            f"candidate tree; attention can. {advice}"
        )
    if has_recurrent_layers(text_config) and not KEEPS_STATES:
        raise MSDUnsupportedError(
            f"The decoder of {name} has recurrent or convolutional layers, whose states can follow a candidate tree "
            f"from transformers 5.17 on; this is {transformers.__version__}. {advice}"
        )


def check_positions(
    text_config: PreTrainedConfig,
    prompt_length: int,
    last_length: int,
    batch_size: int,
    attention_mask: torch.Tensor | None = None,
) -> None:
    """
    Refuses calls in which rotary embeddings change with the length of the text. Token-by-token decoding changes them
    between two positions, but the nodes of one tree have several positions.

    Args:
        text_config (`PreTrainedConfig`): configuration of the decoder.
        prompt_length (`int`): number of positions of the prompt.
        last_length (`int`): number of positions at the length limit of the call.
        batch_size (`int`): number of rows. The longest row decides for all rows.
        attention_mask (`torch.Tensor`, *optional*): mask of the prompt; 0 at padding.

    Raises:
        MSDUnsupportedError: names the length at which the embeddings change, and what to do.
    """
    parameters = getattr(text_config, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):  # some decoders have one entry per kind of layer
        rope_type = rope.get("rope_type") if isinstance(rope, dict) else None
        if rope_type not in LENGTH_DEPENDENT_ROPE:
            continue
        limit = text_config.max_position_embeddings
        if rope_type == "longrope":
            limit = rope.get("original_max_position_embeddings") or limit
            is_full = attention_mask is None or bool(attention_mask.all())
            if prompt_length > limit and batch_size == 1 and is_full:
                continue  # the frequencies for long texts hold from the first token on
        if last_length > limit:
            raise MSDUnsupportedError(
                f"Rotary embeddings of kind {rope_type!r} change where a text gets longer than {limit} tokens, which "
                f"this call may do (it has {prompt_length} and may reach {last_length}); a candidate tree cannot "
                "follow that. Lower `max_new_tokens` or `max_length`, or call `generate` without `assistant_model`."
            )


def check_padding(text_config: PreTrainedConfig, new_length: int, attention_mask: torch.Tensor | None) -> None:
    """
    Refuses padding in front of a window that spares the prompt and moves. Token-by-token decoding of transformers then
    loses track of which slots are padding, and reads them, so that its text depends on the padding.

    Args:
        text_config (`PreTrainedConfig`): configuration of the decoder.
        new_length (`int`): most tokens behind the prompt at the length limit of the call.
        attention_mask (`torch.Tensor`, *optional*): mask of the prompt; 0 at padding.

    Raises:
        MSDUnsupportedError: names the window, and what to do.
    """
    windows = [reach.most for reach in attention_reaches(text_config).values() if reach.spares_prompt]
    if attention_mask is None or not windows or bool(attention_mask.all()):
        return
    window = min(most for most in windows if most is not None)
    if new_length > window:
        raise MSDUnsupportedError(
            f"The target's decoder has a window of {window} tokens behind the prompt, which this call may leave (it "
            f"may reach {new_length}); without a draft, transformers then reads slots of padding, which a draft does "
            "not repeat. Give prompts without padding, or call `generate` without `assistant_model`."
        )


def _check_adapters(target: PreTrainedModel, name: str, advice: str) -> None:
    # During a call through a model of peft, this method of the target is replaced by that model's.
    owner = getattr(target.prepare_inputs_for_generation, "__self__", target)
    adapter: Any = getattr(owner, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise MSDUnsupportedError(
            f"{name} has an adapter of kind {adapter.peft_type.value}, which puts virtual tokens before the prompt "
            f"that MSD drafts know nothing of; LoRA and its like change weights, and can be used. {advice}"
        )
    # peft hooks hand `adapter_names` or `alora_offsets` to each layer. Their values are made for the rows and
    # positions of a call without a draft.
    hooked = (module for module in target.modules() if module._forward_pre_hooks)
    for hook in (hook for module in hooked for hook in module._forward_pre_hooks.values()):
        for argument in ("adapter_names", "alora_offsets"):
            if getattr(hook, "keywords", {}).get(argument) is not None:
                raise MSDUnsupportedError(
                    f"{name} is called with `{argument}`, with which peft adapts some rows or positions of a batch "
                    "only; MSD drafts drop rows that have ended and verify several positions at once. Use one "
                    f"adapter for the whole call (`set_adapter`). {advice}"
                )


def check_pair(target_config: PreTrainedConfig, draft_config: Any) -> None:
    """
    Refuses a draft that was made for another target. Needs no weights, so it can run before they are loaded.

    Args:
        target_config (`PreTrainedConfig`): configuration of the target.
        draft_config (`MSDDraftConfig` or the configuration of another kind of draft): configuration of the draft.

    Raises:
        MSDPairingError: names the difference.
    """
    text_config = target_config.get_text_config(decoder=True)
    advice = "Use the draft that was trained for this target."
    hidden_size = getattr(draft_config, "target_hidden_size", None) or draft_config.hidden_size
    if hidden_size != text_config.hidden_size:
        raise MSDPairingError(
            f"The draft's hidden size {hidden_size} does not match the target's {text_config.hidden_size}. {advice}"
        )
    for name, expected, got in (
        ("target", target_config.model_type, draft_config.target_model_type),
        ("decoder", text_config.model_type, draft_config.target_text_model_type),
    ):
        if got is not None and got != expected:
            raise MSDPairingError(
                f"The draft was made for a {name} of kind {got!r}, but this target's is {expected!r}. {advice}"
            )


def check_tree_fits(target_config: PreTrainedConfig, settings: TreeSettings) -> None:
    """
    Refuses trees with more candidates after a node than the target has tokens.

    Args:
        target_config (`PreTrainedConfig`): configuration of the target.
        settings (`TreeSettings`): settings of the draft's trees.

    Raises:
        MSDPairingError: names both numbers.
    """
    vocab_size = getattr(target_config.get_text_config(decoder=True), "vocab_size", None)
    if vocab_size is not None and settings.top_k > vocab_size:
        raise MSDPairingError(
            f"`draft.generation_config.tree_top_k` is {settings.top_k}, but the target's vocabulary has only "
            f"{vocab_size} tokens. Set it to at most {vocab_size}."
        )


register_target_check(check_target)


__all__ = [
    "KNOWN_MODEL_TYPES",
    "TREE_ATTENTION",
    "check_padding",
    "check_pair",
    "check_positions",
    "check_target",
    "check_tree_fits",
    "decoder_inputs",
    "takes_any_argument",
]
