"""Refusals: arguments of `generate`, settings of a draft and pairs that cannot be served, each with its reason."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ..compat import CACHE_NAME
from ..decoders import decoder_of
from ..draft.interface import Draft
from ..drafting.visual_rows import most_visual_rows
from ..errors import MSDUnsupportedError, shown
from ..kv.transaction import can_commit
from ..target.compiled_parts import compiled_parts
from ..target.layer_kinds import INDEXED, STEP_INPUTS, attention_reaches, has_recurrent_layers, image_layers
from ..target.query_scales import QueryScales
from ..target.stand_in import own_method
from ..target.support import KNOWN_MODEL_TYPES, TREE_ATTENTION, decoder_inputs, takes_any_argument
from ..tree.settings import DRAFT_SETTINGS, TREE_SETTINGS, TreeSettings


# Fields of a `GenerationConfig` that cannot be combined with an MSD draft: the values that switch the field off, and
# the reason. A default that `generate` fills in also counts as off.
REFUSED_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "prompt_lookup_num_tokens": ((None,), "prompt lookup is another way of drafting: choose one of the two"),
    "max_matching_ngram_size": ((None,), "it belongs to prompt lookup, another way of drafting"),
    "assistant_early_exit": ((None,), "early exit is another way of drafting: choose one of the two"),
    "use_mtp": ((None, False), "multi-token prediction is another way of drafting: choose one of the two"),
    "speculation_type": ((None,), "it selects another way of drafting: choose one of the two"),
    "assistant_ensemble_weight": ((None,), "it would change the output, which an MSD draft never does"),
    "assistant_lookbehind": ((None,), "it is for assistants with a tokenizer of their own; a draft has none"),
    "target_lookbehind": ((None,), "it is for assistants with a tokenizer of their own; a draft has none"),
    "dola_layers": ((None,), "DoLa needs the hidden states of every layer at each step"),
    "prefill_chunk_size": ((None,), "the draft reads the hidden states of the whole prompt from one prefill"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance runs the target a second time for each token"),
    "use_cache": ((None, True), "candidates are verified against cached keys and values"),
    "cache_implementation": (
        (None, "dynamic", "dynamic_full"),
        "slots are moved within a dynamic cache; static, offloaded and quantized ones cannot do that",
    ),
    **{name: ((None,), f"set `draft.generation_config.{name}`") for name in TREE_SETTINGS},
    "num_assistant_tokens_schedule": (
        (None, "constant"),
        "every tree has the size that `draft.generation_config` sets",
    ),
    "assistant_confidence_threshold": (
        (None, 0),
        "a tree keeps its most confident candidates up to the size that `draft.generation_config` sets",
    ),
    "token_healing": ((None, False), "it rewrites the prompt after the draft's inputs were prepared"),
    "is_assistant": ((None, False), "it is for models that draft; the draft of this call is `assistant_model`"),
}

# A draft's generation config may contain special tokens, as that of any model. They are ignored: those of the target
# are used.
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def check_call(custom_generate: Any, kwargs: dict[str, Any]) -> None:
    """
    Refuses arguments that `generate` would not pass on, or that could not be distinguished from a default later.

    Args:
        custom_generate (`str` or `Callable`, *optional*): the argument of `generate`.
        kwargs (`dict[str, Any]`): the other keyword arguments of `generate`.

    Raises:
        MSDUnsupportedError: names the argument, its value, and what to do.
    """
    if callable(custom_generate):
        raise MSDUnsupportedError(
            "`custom_generate` cannot be used with an MSD draft: `generate` does not hand `assistant_model` on to a "
            "function. Leave one of the two out."
        )
    for name in REFUSED_ARGUMENTS:
        _check_argument(name, kwargs.get(name))
    if kwargs.get(CACHE_NAME) is not None:
        check_inputs(kwargs)
        kwargs[CACHE_NAME]._is_user_defined = True  # as `generate` itself marks it from 5.24 on


def _check_argument(name: str, value: Any, default: Any = None) -> None:
    off, reason = REFUSED_ARGUMENTS[name]
    if value not in off and value != default:
        raise MSDUnsupportedError(f"`{name}={value!r}` cannot be used with an MSD draft: {reason}.")


def check_generation_mode(
    generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
) -> None:
    """
    Refuses generation arguments that do not work with a draft.

    Raises:
        MSDUnsupportedError: names the argument, its value, and what to do.
    """
    defaults = GenerationConfig._get_default_generation_params()
    for name in REFUSED_ARGUMENTS:
        _check_argument(name, getattr(generation_config, name, None), defaults.get(name))
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise MSDUnsupportedError(
            f"An MSD draft works with greedy decoding and sampling, not with {generation_mode.value!r}: leave out "
            "what asks for it (`num_beams`, `penalty_alpha`, `constraints`, `force_words_ids`), or `assistant_model`."
        )
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise MSDUnsupportedError("Leave `assistant_tokenizer` out: an MSD draft uses the target's tokens.")
    if generation_mode_kwargs.get("synced_gpus"):
        raise MSDUnsupportedError(
            "`synced_gpus=True` cannot be used with an MSD draft: processes would run different numbers of forwards. "
            "Load the target whole on each, or with `tp_plan` or `device_map`."
        )


def check_draft_settings(generation_config: GenerationConfig) -> None:
    """
    Refuses settings of a draft that would be ignored.

    Args:
        generation_config (`GenerationConfig`): the draft's generation config.

    Raises:
        MSDError: when a setting of the tree is out of range.
        MSDUnsupportedError: names the setting, its value, and what to do.
    """
    TreeSettings.from_generation_config(generation_config)
    most_visual_rows(generation_config, None)
    defaults = GenerationConfig._get_default_generation_params()
    del defaults["assistant_confidence_threshold"]  # `generate` does not fill it in for a draft
    for name, value in vars(generation_config).items():
        if name.startswith("_") or name in (*DRAFT_SETTINGS, *_SPECIAL_TOKENS, "transformers_version"):
            continue
        if value not in (None, False, defaults.get(name)):
            raise MSDUnsupportedError(
                f"`draft.generation_config.{name}={shown(value)}` has no effect: of a draft's settings only "
                f"{', '.join(f'`{setting}`' for setting in DRAFT_SETTINGS)} are read. Set it to None; what shall "
                "change the output is an argument of `generate`."
            )


def check_inputs(model_kwargs: dict[str, Any]) -> None:
    """
    Refuses caches that the loop cannot serve.

    Raises:
        MSDUnsupportedError: names the cache and what to do.
    """
    cache: Any = model_kwargs.get(CACHE_NAME)
    layers = getattr(cache, "layers", [])
    is_dynamic = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not is_dynamic or not all(can_commit(layer) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise MSDUnsupportedError(
            f"A `{type(cache).__name__}` (layers: {kinds}) cannot be used with an MSD draft, which moves accepted "
            "slots within the cache: use a plain `DynamicCache`, or leave the cache out."
        )


def check_compilable(target: PreTrainedModel, draft: Draft) -> None:
    """
    Refuses pairs that cannot be compiled.

    Raises:
        MSDUnsupportedError: says why and what to do.
    """
    reason, decoder = None, decoder_of(target)
    implementation = decoder.config._attn_implementation
    # Compiled layers are told by an argument to use another attention function.
    is_told = takes_any_argument(decoder) and target.config.model_type in KNOWN_MODEL_TYPES
    if TreeSettings.from_generation_config(draft.generation_config).is_auto:
        reason = '`num_assistant_tokens="auto"` gives each tree another shape: set a number of nodes'
    elif (of_layers := _uncompiled_layers(target)) is not None:
        reason = of_layers
    elif draft.reads_layers:
        reason = "the draft reads layers inside the target's decoder, which compiled code does not show"
    elif any(hasattr(module, "_hf_hook") for module in (*target.modules(), *draft.modules())):
        reason = "accelerate moves weights or inputs of single modules: load target and draft whole on one device"
    elif compiled_parts(target):
        reason = "the target is compiled already: use it as it was loaded"
    elif own_method(decoder, "forward") is not None:
        reason = "the forward of the target's decoder was replaced, which compiled code passes over: restore it"
    elif implementation not in TREE_ATTENTION and not (is_told and decoder._supports_sdpa):
        reason = (
            f"the attention implementation {implementation!r} of the target takes no tree mask: load it with "
            '`attn_implementation="sdpa"`'
        )
    elif target.device != draft.device:
        reason = f"the target is on {target.device}, the draft on {draft.device}: put both on one device"
    if reason is not None:
        raise MSDUnsupportedError(f"`draft.generation_config.compile=True` cannot be used here: {reason}.")


def _uncompiled_layers(target: PreTrainedModel) -> str | None:
    """Why the layers of a target cannot be compiled; `None` if they can."""
    text_config = target.config.get_text_config(decoder=True)
    reaches = attention_reaches(text_config)
    if any(reach.spares_prompt for reach in reaches.values()):
        return "layers of the target have a window that spares the prompt, of which compiled code knows nothing"
    if not INDEXED.isdisjoint(reaches):
        return "indexers of the target's layers keep keys for which compiled code has no buffers"
    if has_recurrent_layers(text_config):
        return "recurrent or convolutional layers of the target keep states for which compiled code has no buffers"
    if image_layers(text_config):
        return "cross-attention layers of the target keep states of images for which compiled code has no buffers"
    if not STEP_INPUTS.keys().isdisjoint(decoder_inputs(decoder_of(target))):
        return "the target's decoder reads images or another input in every forward, which compiled code lacks"
    if QueryScales(decoder_of(target)).projections:
        return "layers of the target scale queries by the place of a token in the cache, which compiled code lacks"
    return None


__all__ = [
    "REFUSED_ARGUMENTS",
    "check_call",
    "check_compilable",
    "check_draft_settings",
    "check_generation_mode",
    "check_inputs",
]
