"""The hook into `GenerationMixin`: `generate(assistant_model=draft)` runs our loop, or says why it cannot.

`generate` looks its methods up on the class, so the hook is three wrapped methods of `GenerationMixin` itself: one
reads the arguments, one validates them, one decodes. They act on `MSDDraftModel` assistants alone and pass every other
call on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoModel, DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from .cache import CACHE_NAME
from .compiled import check_compilable, is_compiled
from .configuration_msd import MSDDraftConfig
from .errors import MSDUnsupportedError
from .generation import msd_decoding
from .modeling_msd import MSDDraftModel
from .target_support import check_pair, check_target
from .tree import TreeSettings


logger = logging.get_logger(__name__)

_originals: dict[str, Any] = {}
_wrappers: dict[str, Any] = {}


def register() -> None:
    """Teaches `generate` and the Auto classes about MSD drafts. `import msd_hf` does it; twice is the same as once."""
    AutoConfig.register(MSDDraftConfig.model_type, MSDDraftConfig, exist_ok=True)
    AutoModel.register(MSDDraftConfig, MSDDraftModel, exist_ok=True)
    if _originals:
        return
    for name, wrap in (
        ("_extract_generation_mode_kwargs", _wrap_extract_generation_mode_kwargs),
        ("_validate_generation_mode", _wrap_validate_generation_mode),
        ("_assisted_decoding", _wrap_assisted_decoding),
    ):
        _originals[name] = GenerationMixin.__dict__[name]
        _wrappers[name] = wrap(_originals[name])
        setattr(GenerationMixin, name, _wrappers[name])


def unregister() -> None:
    """Puts `GenerationMixin` and the Auto classes back as they were before `import msd_hf`."""
    CONFIG_MAPPING._extra_content.pop(MSDDraftConfig.model_type, None)
    MODEL_MAPPING._extra_content.pop(MSDDraftConfig, None)
    for name, original in _originals.items():
        if GenerationMixin.__dict__[name] is _wrappers[name]:
            setattr(GenerationMixin, name, original)
        else:  # undoing ours would undo theirs
            logger.warning(f"`GenerationMixin.{name}` was replaced by another library after msd_hf; left as it is.")
    _originals.clear()
    _wrappers.clear()


def _wrap_extract_generation_mode_kwargs(original):
    @functools.wraps(original)
    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        if isinstance(assistant_model, MSDDraftModel):
            check_call(custom_generate, kwargs)
        return original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)

    return _extract_generation_mode_kwargs


def _wrap_validate_generation_mode(original):
    @functools.wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        draft = generation_mode_kwargs.get("assistant_model")
        if not isinstance(draft, MSDDraftModel):
            return original(self, generation_mode, generation_config, generation_mode_kwargs)
        # Everything here comes before the first forward.
        check_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        check_target(self)
        check_pair(self.config, draft.config)
        check_draft_settings(draft.generation_config)
        if is_compiled(draft.generation_config):
            check_compilable(self, draft)
        # The original compares vocabularies and asks for tokenizers; embedding and head are the target's here.
        # It also refuses several sequences a prompt in assisted generation, which are no different here.
        others = {key: value for key, value in generation_mode_kwargs.items() if key != "assistant_model"}
        mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
        return original(self, mode, generation_config, others)

    return _validate_generation_mode


def _wrap_assisted_decoding(original):
    @functools.wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        if not isinstance(assistant_model, MSDDraftModel):
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        # `generate` passes everything else by name.
        for name in ("inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(name, None)
        check_inputs(kwargs)
        kwargs.pop("synced_gpus", None)
        # It warns of a `compile_config`, which has no effect with a dynamic cache.
        self._valid_auto_compile_criteria(kwargs, kwargs["generation_config"])
        with _evaluating(assistant_model):
            return msd_decoding(self, input_ids, draft=assistant_model, **kwargs)

    return _assisted_decoding


@contextmanager
def _evaluating(draft: MSDDraftModel) -> Iterator[None]:
    """A draft as it is made is in training mode, in which dropout would draw from the random numbers of the call."""
    training = [module for module in draft.modules() if module.training]
    draft.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# Fields of a `GenerationConfig` that cannot be combined with an MSD draft: values that leave them off, and why. What
# `generate` fills in by itself leaves them off too.
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
    "num_assistant_tokens": ((None,), "set `draft.generation_config.num_assistant_tokens`"),
    "tree_depth": ((None,), "set `draft.generation_config.tree_depth`"),
    "tree_top_k": ((None,), "set `draft.generation_config.tree_top_k`"),
    "suffix_nodes": ((None,), "set `draft.generation_config.suffix_nodes`"),
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

_DRAFT_SETTINGS = ("num_assistant_tokens", "tree_depth", "tree_top_k", "suffix_nodes", "compile")
# A draft's generation config may name these, as every model's does; they are the target's.
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def check_call(custom_generate: Any, kwargs: dict[str, Any]) -> None:
    """
    Refuses what `generate` would not hand on, and what cannot be told from a default later.

    Args:
        custom_generate (`str` or `Callable`, *optional*): as given to `generate`.
        kwargs (`dict[str, Any]`): its keyword arguments, as they were given.

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
        generation_config (`GenerationConfig`): the draft's.

    Raises:
        MSDError: when a setting of the tree is out of its range.
        MSDUnsupportedError: names the setting, its value, and what to do.
    """
    TreeSettings.from_generation_config(generation_config)
    defaults = GenerationConfig._get_default_generation_params()
    del defaults["assistant_confidence_threshold"]  # nobody fills it in here
    for name, value in vars(generation_config).items():
        if name.startswith("_") or name in (*_DRAFT_SETTINGS, *_SPECIAL_TOKENS, "transformers_version"):
            continue
        if value not in (None, False, defaults.get(name)):
            raise MSDUnsupportedError(
                f"`draft.generation_config.{name}={value!r}` has no effect: of a draft's settings only "
                f"{', '.join(f'`{setting}`' for setting in _DRAFT_SETTINGS)} are read. Set it to None; what shall "
                "change the output is an argument of `generate`."
            )


def check_inputs(model_kwargs: dict[str, Any]) -> None:
    """
    Refuses caches that the loop cannot serve, which are only known once `generate` has prepared its inputs.

    Raises:
        MSDUnsupportedError: names the cache and what to do.
    """
    cache: Any = model_kwargs.get(CACHE_NAME)
    layers = getattr(cache, "layers", [])
    is_dynamic = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not is_dynamic or not all(isinstance(layer, DynamicLayer) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise MSDUnsupportedError(
            f"A `{type(cache).__name__}` (layers: {kinds}) cannot be used with an MSD draft, which moves accepted "
            "slots within the cache: use a plain `DynamicCache`, or leave the cache out."
        )


__all__ = ["register", "unregister"]
