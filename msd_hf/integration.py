"""The hook into `GenerationMixin`: `generate(assistant_model=draft)` runs our loop, or says why it cannot.

`generate` looks its decoding methods up on the class, so the hook is two wrapped methods of `GenerationMixin` itself;
they act on `MSDDraftModel` assistants alone and pass every other call on.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig, AutoModel, DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from .cache import CACHE_NAME
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
        ("_assisted_decoding", _wrap_assisted_decoding),
        ("_validate_generation_mode", _wrap_validate_generation_mode),
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
        TreeSettings.from_generation_config(draft.generation_config)
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
        return msd_decoding(self, input_ids, draft=assistant_model, **kwargs)

    return _assisted_decoding


# Generation arguments that cannot be combined with an MSD draft: values that leave them off, and what to do instead.
REFUSED_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "prompt_lookup_num_tokens": ((None,), "prompt lookup is another way of drafting: choose one of the two"),
    "assistant_early_exit": ((None,), "early exit is another way of drafting: choose one of the two"),
    "use_mtp": ((None, False), "multi-token prediction is another way of drafting: choose one of the two"),
    "speculation_type": ((None,), "it selects another way of drafting: choose one of the two"),
    "assistant_ensemble_weight": ((None,), "it would change the output, which an MSD draft never does"),
    "dola_layers": ((None,), "DoLa needs the hidden states of every layer at each step"),
    "prefill_chunk_size": ((None,), "the draft reads the hidden states of the whole prompt from one prefill"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance runs the target a second time for each token"),
    "use_cache": ((None, True), "candidates are verified against cached keys and values"),
    "cache_implementation": (
        (None, "dynamic", "dynamic_full"),
        "slots are moved within a dynamic cache; static, offloaded and quantized ones cannot do that",
    ),
    "num_assistant_tokens": ((None, 20), "set `draft.generation_config.num_assistant_tokens`"),
    "num_assistant_tokens_schedule": ((None, "constant"), "candidate trees have settings of their own"),
    "assistant_confidence_threshold": ((None, 0.4), "candidate trees have settings of their own"),
    "token_healing": ((None, False), "it rewrites the prompt after the draft's inputs were prepared"),
    "is_assistant": ((None, False), "it is for models that draft; the draft of this call is `assistant_model`"),
}


def check_generation_mode(
    generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
) -> None:
    """
    Refuses generation arguments that do not work with a draft.

    Raises:
        MSDUnsupportedError: names the argument, its value, and what to do.
    """
    for name, (allowed, reason) in REFUSED_ARGUMENTS.items():
        value = getattr(generation_config, name, None)
        if value not in allowed:
            raise MSDUnsupportedError(f"`{name}={value!r}` cannot be used with an MSD draft: {reason}.")
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise MSDUnsupportedError(
            f"An MSD draft works with greedy decoding and sampling, not with {generation_mode.value!r} "
            f"(num_beams={generation_config.num_beams}): leave `num_beams` at 1, or leave `assistant_model` out."
        )
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise MSDUnsupportedError("Leave `assistant_tokenizer` out: an MSD draft uses the target's tokens.")
    if generation_mode_kwargs.get("synced_gpus"):
        raise MSDUnsupportedError(
            "`synced_gpus=True` cannot be used with an MSD draft: processes would run different numbers of forwards. "
            "Load the target whole on each, or with `tp_plan` or `device_map`."
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
