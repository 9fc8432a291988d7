"""Which targets a draft can be used with: kinds of models, layers and attention, and whether the pair fits."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_msd import MSDDraftConfig
from .errors import MSDPairingError, MSDUnsupportedError


# Attention implementations that take an additive mask; the others give way to sdpa while a tree is verified.
TREE_ATTENTION = ("sdpa", "eager")

# Kinds of targets of which the tests show that a tree is verified correctly. Any other one is tried at its first call.
KNOWN_MODEL_TYPES = frozenset(
    {
        "aya_vision",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "idefics3",
        "internvl",
        "llama",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral",
        "mistral3",
        "paligemma",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3",
        "qwen3_vl",
        "smolvlm",
        "vipllava",
    }
)

_FULL, _SLIDING = "full_attention", "sliding_attention"


def attention_windows(text_config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of layers of a decoder and the window of each, in tokens; `None`: no window."""
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is None:  # Mistral has a window on every layer, without a list of layer types
        layer_types = [_FULL if window is None else _SLIDING]
    return {kind: window if kind == _SLIDING else None for kind in sorted(set(layer_types))}


def layer_windows(text_config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer of a decoder."""
    windows = attention_windows(text_config)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is None:
        return [next(iter(windows.values()))] * text_config.num_hidden_layers
    return [windows[kind] for kind in layer_types]


def check_target(target: PreTrainedModel) -> None:
    """
    Refuses targets that the decoding loop cannot serve.

    Raises:
        MSDUnsupportedError: names the target's kind or its layers, and what to do.
    """
    name = f"`{type(target).__name__}` (model_type {target.config.model_type!r})"
    advice = "Call `generate` without `assistant_model`."
    if target.config.is_encoder_decoder:
        raise MSDUnsupportedError(f"{name} is an encoder-decoder model, of which MSD drafts know nothing. {advice}")
    if target.get_output_embeddings() is None or target.get_decoder() is target:
        raise MSDUnsupportedError(
            f"{name} has no decoder (`get_decoder()`) with a language-model head (`get_output_embeddings()`) behind "
            f"it, which MSD drafts read and use. {advice}"
        )
    _check_adapters(target, name, advice)
    text_config = target.config.get_text_config(decoder=True)
    others = attention_windows(text_config).keys() - {_FULL, _SLIDING}
    if others or target._is_stateful:
        kinds = f"layers of type {', '.join(sorted(others))}" if others else "a recurrent state"
        raise MSDUnsupportedError(
            f"The decoder of {name} has {kinds}, which cannot keep one branch of a candidate tree; full and "
            f"sliding-window attention can. {advice}"
        )


def _check_adapters(target: PreTrainedModel, name: str, advice: str) -> None:
    # peft lends its model's method to the target for the time of a call.
    owner = getattr(target.prepare_inputs_for_generation, "__self__", target)
    adapter: Any = getattr(owner, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise MSDUnsupportedError(
            f"{name} has an adapter of kind {adapter.peft_type.value}, which puts virtual tokens before the prompt "
            f"that MSD drafts know nothing of; LoRA and its like change weights, and can be used. {advice}"
        )
    # Each layer gets these from a hook, for the rows and positions of a call without a draft.
    for hook in (hook for module in target.modules() for hook in module._forward_pre_hooks.values()):
        for argument in ("adapter_names", "alora_offsets"):
            if getattr(hook, "keywords", {}).get(argument) is not None:
                raise MSDUnsupportedError(
                    f"{name} is called with `{argument}`, with which peft adapts some rows or positions of a batch "
                    "only; MSD drafts drop rows that have ended and verify several positions at once. Use one "
                    f"adapter for the whole call (`set_adapter`). {advice}"
                )


def check_pair(target_config: PreTrainedConfig, draft_config: MSDDraftConfig) -> None:
    """
    Refuses a draft that was made for another target. Needs no weights, so it can come before loading them.

    Raises:
        MSDPairingError: says what differs.
    """
    text_config = target_config.get_text_config(decoder=True)
    advice = "Use the draft that was trained for this target."
    if draft_config.hidden_size != text_config.hidden_size:
        raise MSDPairingError(
            f"The draft's hidden size {draft_config.hidden_size} does not match the target's "
            f"{text_config.hidden_size}. {advice}"
        )
    for name, expected, got in (
        ("target", target_config.model_type, draft_config.target_model_type),
        ("decoder", text_config.model_type, draft_config.target_text_model_type),
    ):
        if got is not None and got != expected:
            raise MSDPairingError(
                f"The draft was made for a {name} of kind {got!r}, but this target's is {expected!r}. {advice}"
            )


__all__ = [
    "KNOWN_MODEL_TYPES",
    "TREE_ATTENTION",
    "attention_windows",
    "check_pair",
    "check_target",
    "layer_windows",
]
