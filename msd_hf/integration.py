"""The hook into `GenerationMixin`: `generate(assistant_model=draft)` runs our loop, or says why it cannot.

`generate` looks its decoding methods up on the class, so the hook is two wrapped methods of `GenerationMixin` itself;
they act on `MSDDraftModel` assistants alone and pass every other call on.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig, AutoModel, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
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
from .targets import check_pair, check_target
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
        others = {key: value for key, value in generation_mode_kwargs.items() if key != "assistant_model"}
        return original(self, generation_mode, generation_config, others)

    return _validate_generation_mode


def _wrap_assisted_decoding(original):
    @functools.wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        if not isinstance(assistant_model, MSDDraftModel):
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        # `generate` passes everything else by name.
        for name in ("inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(name, None)
        check_inputs(self, input_ids, kwargs)
        kwargs.pop("synced_gpus", None)
        return msd_decoding(self, input_ids, draft=assistant_model, **kwargs)

    return _assisted_decoding


# Generation arguments that cannot be combined with an MSD draft: value that leaves them off, and what to do instead.
_REFUSED_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "prompt_lookup_num_tokens": ((None,), "prompt lookup is another way of drafting: choose one of the two"),
    "assistant_early_exit": ((None,), "early exit is another way of drafting: choose one of the two"),
    "use_mtp": ((None, False), "multi-token prediction is another way of drafting: choose one of the two"),
    "speculation_type": ((None,), "it selects another way of drafting: choose one of the two"),
    "assistant_ensemble_weight": ((None,), "it would change the output, which an MSD draft never does"),
    "dola_layers": ((None,), "DoLa needs the hidden states of every layer at each step"),
    "prefill_chunk_size": ((None,), "the draft reads the hidden states of the whole prompt from one prefill"),
    "output_attentions": ((None, False), "attentions of a verification are those of the whole tree"),
    "output_hidden_states": ((None, False), "hidden states of a verification are those of the whole tree"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance runs the target a second time for each token"),
    "num_return_sequences": ((None, 1), "one sequence a call is supported: call `generate` once for each"),
}


def check_generation_mode(
    generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
) -> None:
    """
    Refuses generation arguments that do not work with a draft.

    Raises:
        MSDUnsupportedError: names the argument, its value, and what to do.
    """
    for name, (allowed, reason) in _REFUSED_ARGUMENTS.items():
        value = getattr(generation_config, name, None)
        if value not in allowed:
            raise MSDUnsupportedError(f"`{name}={value!r}` cannot be used with an MSD draft: {reason}.")
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise MSDUnsupportedError(
            f"An MSD draft works with greedy decoding and sampling, not with {generation_mode.value!r} "
            f"(num_beams={generation_config.num_beams}): leave `num_beams` at 1, or leave `assistant_model` out."
        )
    if generation_config.use_cache is False:
        raise MSDUnsupportedError("`use_cache=False` cannot be used with an MSD draft: leave the cache on.")
    implementation = generation_config.cache_implementation
    if implementation not in (None, "dynamic", "dynamic_full"):
        raise MSDUnsupportedError(
            f"`cache_implementation={implementation!r}` cannot be used with an MSD draft yet: leave it out for the "
            "dynamic cache."
        )
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise MSDUnsupportedError("Leave `assistant_tokenizer` out: an MSD draft uses the target's tokens.")
    if generation_mode_kwargs.get("synced_gpus"):
        raise MSDUnsupportedError("`synced_gpus=True` cannot be used with an MSD draft yet.")


def check_inputs(target: PreTrainedModel, input_ids, model_kwargs: dict[str, Any]) -> None:
    """
    Refuses inputs that the loop cannot serve, as far as they are only known once `generate` has prepared them.

    Raises:
        MSDUnsupportedError: names the input and what to do.
    """
    if input_ids.shape[0] != 1:
        raise MSDUnsupportedError(
            f"MSD drafts support one prompt a call yet, got {input_ids.shape[0]}: call `generate` once for each."
        )
    if model_kwargs.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise MSDUnsupportedError(
            "`inputs_embeds` prompts cannot be used with an MSD draft yet: which positions are visual is read from "
            "`input_ids`. Pass `input_ids` and `pixel_values`."
        )
    cache: Any = model_kwargs.get(CACHE_NAME)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise MSDUnsupportedError(
            f"A cache of type `{type(cache).__name__}` with layers "
            f"{sorted({type(layer).__name__ for layer in getattr(cache, 'layers', [])})} cannot be used with an MSD "
            "draft yet: use a `DynamicCache`."
        )
    if cache.get_seq_length() > 0:
        raise MSDUnsupportedError(
            "A filled `past_key_values` cannot be used with an MSD draft yet: the draft reads the hidden states of "
            "the whole prompt. Pass the whole conversation without `past_key_values`."
        )


__all__ = ["register", "unregister"]
