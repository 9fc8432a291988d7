"""The hook into pipelines: the draft that is given to a pipeline reaches `generate`.

Some pipelines take an `assistant_model` and never use it, and those that use it ask for tokenizers that a draft does
not need. Three functions are wrapped: one reads the argument at construction, two start a call. They act on drafts and
pass everything else on.
"""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from typing import Any

from transformers.pipelines import base

from ..draft.interface import is_draft
from ..errors import MSDUnsupportedError
from .assistant import beside_target, find_draft, load_draft
from .wrapping import Wrappers


# Drafts that pipelines have loaded by name, so that a name in each call is loaded once.
_loaded: weakref.WeakKeyDictionary[base.Pipeline, dict[str, Any]] = weakref.WeakKeyDictionary()


def wrap_pipelines(wrappers: Wrappers) -> None:
    """Wraps the functions with which pipelines read `assistant_model` and start a call."""
    wrappers.wrap(base, "load_assistant_model", _wrap_load_assistant_model)
    wrappers.wrap(base.Pipeline, "run_single", _wrap_run_single)
    wrappers.wrap(base.Pipeline, "get_iterator", _wrap_get_iterator)


def _wrap_load_assistant_model(original):
    @functools.wraps(original)
    def load_assistant_model(model, assistant_model, assistant_tokenizer):
        draft = _draft_for(model, assistant_model)
        if draft is None:
            return original(model, assistant_model, assistant_tokenizer)
        return draft, None  # a draft uses the target's tokens, so no tokenizer is needed

    return load_assistant_model


def _wrap_run_single(original):
    @functools.wraps(original)
    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        preprocess_params, forward_params = _with_draft(self, preprocess_params, forward_params)
        return original(self, inputs, preprocess_params, forward_params, postprocess_params)

    return run_single


def _wrap_get_iterator(original):
    @functools.wraps(original)
    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        preprocess_params, forward_params = _with_draft(self, preprocess_params, forward_params)
        return original(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params)

    return get_iterator


def _with_draft(
    pipeline: base.Pipeline, preprocess_params: dict[str, Any], forward_params: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of one call, with the draft among the arguments of `generate`: that of the call, else that of the
    pipeline. A call with `assistant_model=None` is made without one."""
    arguments = inspect.signature(pipeline._forward).parameters.get("generate_kwargs")
    if arguments is None:  # the pipeline does not generate
        return preprocess_params, forward_params
    if arguments.kind is inspect.Parameter.VAR_KEYWORD:
        # Such a pipeline hands an `assistant_model` on by itself, but does not load one by its name.
        draft = _draft_in_call(pipeline, forward_params.get("assistant_model"))
        return preprocess_params, forward_params if draft is None else {**forward_params, "assistant_model": draft}
    options = dict(forward_params.get("generate_kwargs") or {})
    # Such a pipeline takes an `assistant_model` of the call for an argument of its processor.
    if _names_a_draft(pipeline, preprocess_params):
        preprocess_params = dict(preprocess_params)
        given = preprocess_params.pop("assistant_model")
        if "assistant_model" in options:
            raise MSDUnsupportedError(
                "`assistant_model` is given twice, as an argument and in `generate_kwargs`: leave one of the two out."
            )
        options["assistant_model"] = given
    elif "assistant_model" not in options and is_draft(getattr(pipeline, "assistant_model", None)):
        options["assistant_model"] = pipeline.assistant_model
    draft = _draft_in_call(pipeline, options.get("assistant_model"))
    if draft is not None:
        options["assistant_model"] = draft
    if "assistant_model" in options:
        forward_params = {**forward_params, "generate_kwargs": options}
    return preprocess_params, forward_params


def _names_a_draft(pipeline: base.Pipeline, preprocess_params: dict[str, Any]) -> bool:
    if "assistant_model" not in preprocess_params:
        return False
    given = preprocess_params["assistant_model"]
    return given is None or _draft_in_call(pipeline, given) is not None


def _draft_in_call(pipeline: base.Pipeline, given: Any) -> Any:
    """The draft that is given to a call; `None` for another assistant."""
    if not isinstance(given, (str, os.PathLike)):
        return _draft_for(pipeline.model, given)
    loaded = _loaded.setdefault(pipeline, {})
    if str(given) not in loaded:
        loaded[str(given)] = load_draft(given, pipeline.model)
    return loaded[str(given)]


def _draft_for(target: Any, given: Any) -> Any:
    """The draft that is given as a model or by its name, beside the target; `None` for another assistant."""
    if isinstance(given, (str, os.PathLike)):
        return load_draft(given, target)
    draft = find_draft(given)
    return None if draft is None else beside_target(draft, target)


__all__ = ["wrap_pipelines"]
