"""The hook into `GenerationMixin`: `generate(assistant_model=draft)` runs our loop, or says why it cannot.

`generate` looks its methods up on the class, so the hook consists of three wrapped methods of `GenerationMixin`: one
reads the arguments, one validates them, one decodes. They act on calls with a draft and pass every other call on.
"""

from __future__ import annotations

import functools

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.generation import GenerationMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from ..attention.substitution import restore_attention
from ..compiled.compile import is_compiled
from ..decoding.loop import msd_decoding
from ..draft.evaluation_mode import evaluating
from ..draft.interface import draft_kinds, is_draft
from ..recurrent.kernels import restore_kernels
from ..target.support import check_pair, check_target, check_tree_fits
from ..tree.settings import TreeSettings
from .acquaintance import compare_once
from .assistant import find_draft
from .pipelines import wrap_pipelines
from .refusals import check_call, check_compilable, check_draft_settings, check_generation_mode, check_inputs
from .wrapping import Wrappers


_wrappers = Wrappers()

# The documentation of transformers loads an assistant with `AutoModelForCausalLM`.
_AUTO_CLASSES = {AutoModel: MODEL_MAPPING, AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING}


def register() -> None:
    """
    Makes `generate`, pipelines and the Auto classes know drafts.

    `import msd_hf` does it, if transformers is loaded, or else the first use of one of them. A second call changes
    nothing. After [`unregister`], this function registers drafts again.
    """
    for config_class, model_class in draft_kinds().items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in _AUTO_CLASSES:
            auto_class.register(config_class, model_class, exist_ok=True)
    if _wrappers:
        return
    _wrappers.wrap(GenerationMixin, "_extract_generation_mode_kwargs", _wrap_extract_generation_mode_kwargs)
    _wrappers.wrap(GenerationMixin, "_validate_generation_mode", _wrap_validate_generation_mode)
    _wrappers.wrap(GenerationMixin, "_assisted_decoding", _wrap_assisted_decoding)
    wrap_pipelines(_wrappers)


def unregister() -> None:
    """
    Puts `GenerationMixin`, pipelines, the Auto classes and what attention and recurrent layers call back as they were
    before `import msd_hf`.

    A method that another library has wrapped since then stays as it is, with a warning.
    """
    restore_attention()
    restore_kernels()
    for config_class in draft_kinds():
        CONFIG_MAPPING._extra_content.pop(config_class.model_type, None)
        for mapping in _AUTO_CLASSES.values():
            mapping._extra_content.pop(config_class, None)
    _wrappers.put_back()


def _wrap_extract_generation_mode_kwargs(original):
    @functools.wraps(original)
    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        draft = find_draft(assistant_model)
        if draft is not None:
            check_call(custom_generate, kwargs)
            assistant_model = draft
        return original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)

    return _extract_generation_mode_kwargs


def _wrap_validate_generation_mode(original):
    @functools.wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        draft = generation_mode_kwargs.get("assistant_model")
        if not is_draft(draft):
            return original(self, generation_mode, generation_config, generation_mode_kwargs)
        # All checks come before the first forward.
        check_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        check_target(self)
        check_pair(self.config, draft.config)
        check_draft_settings(draft.generation_config)
        check_tree_fits(self.config, TreeSettings.from_generation_config(draft.generation_config))
        if is_compiled(draft.generation_config):
            check_compilable(self, draft)
        compare_once(self, draft)
        # The original compares vocabularies and asks for tokenizers, but embedding and head are the target's here. It
        # also refuses several sequences a prompt in assisted generation, which our loop serves.
        others = {key: value for key, value in generation_mode_kwargs.items() if key != "assistant_model"}
        mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
        return original(self, mode, generation_config, others)

    return _validate_generation_mode


def _wrap_assisted_decoding(original):
    @functools.wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        if not is_draft(assistant_model):
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        # The loop has no use for these arguments. It gets all others by name.
        for name in ("inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(name, None)
        check_inputs(kwargs)
        kwargs.pop("synced_gpus", None)
        # This method warns of a `compile_config`, which has no effect with a dynamic cache.
        self._valid_auto_compile_criteria(kwargs, kwargs["generation_config"])
        with evaluating(assistant_model):
            return msd_decoding(self, input_ids, draft=assistant_model, **kwargs)

    return _assisted_decoding


__all__ = ["register", "unregister"]
