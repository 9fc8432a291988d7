"""Another attention function for single forwards, without a change of the model's config.

A model reads the name of its attention function from its config, which other calls of the model share. transformers
looks the function up by this name, so a function is registered there that looks for a substitute first: in its
arguments for compiled forwards, in a context variable for others. Without a substitute it calls the function that was
registered before.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from .split import LIVE_SLOTS, split_sdpa


@dataclass
class Substitution:
    """
    Another attention function for the layers of one decoder.

    Args:
        config (`PreTrainedConfig`): config of the decoder; its layers have the same object.
        name (`str`): "sdpa" or "eager".
        mask (`torch.Tensor` of shape `[B, 1, T, S]`, *optional*): the mask that the function gets, in place of the one
            that the layer hands over.
        num_calls (`int`): how often a layer has used it.
    """

    config: Any
    name: str
    mask: torch.Tensor | None = None
    num_calls: int = 0


_current: ContextVar[Substitution | None] = ContextVar("msd_hf.attention", default=None)
_functions = AttentionInterface()
_replaced: dict[str, Callable[..., Any]] = {}  # name -> the function that we have registered
_lock = threading.Lock()


@contextmanager
def substituted(substitution: Substitution | None) -> Iterator[None]:
    """Inside the block the calls of this thread use the substitute; `None` ends an outer substitution.

    The name in the decoder's config must have been given to [`allow_substitutes`].
    """
    token = _current.set(substitution)
    try:
        yield
    finally:
        _current.reset(token)


def allow_substitutes(name: str) -> None:
    """Lets [`substituted`] and the argument `LIVE_SLOTS` replace the attention function of this name. Other calls get
    the function that was registered before. Eager attention is not registered, and cannot be replaced."""
    if name == "eager":
        return
    with _lock:
        function = _functions[name]
        if function is not _replaced.get(name):
            _replaced[name] = _substitutable(function)
            AttentionInterface.register(name, _replaced[name])


def restore_attention() -> None:
    """Registers all functions again that [`allow_substitutes`] has replaced, unless other code has replaced ours."""
    with _lock:
        for name, function in _replaced.items():
            if _functions.get(name) is function:
                AttentionInterface.register(name, function.__wrapped__)  # type: ignore[attr-defined]
        _replaced.clear()


def _substitutable(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        # Arguments are query, key, value and the mask, in this order.
        if kwargs.get(LIVE_SLOTS) is not None:
            return split_sdpa(module, *args, **kwargs)
        # torch.compile cannot read a context variable, and compiled forwards have no substitute but the one above.
        if not torch.compiler.is_dynamo_compiling():
            substitution = _current.get()
            if substitution is not None and getattr(module, "config", None) is substitution.config:
                substitution.num_calls += 1
                if substitution.mask is not None:
                    kwargs.pop("attention_mask", None)
                    args = (*args[:3], substitution.mask.to(args[0].device), *args[4:])
                with substituted(None):  # the substitute may have been wrapped by this function too
                    return _function_of(module, substitution.name)(module, *args, **kwargs)
        return function(module, *args, **kwargs)

    return attend


def _function_of(module: Any, name: str) -> Callable[..., Any]:
    if name == "eager":  # not registered: the file of each model has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return _functions[name]


__all__ = ["Substitution", "allow_substitutes", "restore_attention", "substituted"]
