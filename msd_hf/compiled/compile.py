"""Forwards of fixed shapes under `torch.compile`: with CUDA graphs on a GPU, as larger kernels on a CPU."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import MSDUnsupportedError


BACKEND = "inductor"

# Of models, the compiled functions by shape: Dynamo would go through all compilations of one function at each call,
# and not compile any more after the eighth.
_compiled: weakref.WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def is_compiled(generation_config: Any) -> bool:
    """Whether a draft's generation config asks for compiled forwards.

    Raises:
        MSDUnsupportedError: when `compile` is not a boolean.
    """
    value = getattr(generation_config, "compile", None)
    if value not in (None, False, True):
        raise MSDUnsupportedError(f"`draft.generation_config.compile` must be True or False, got {value!r}.")
    return bool(value)


def run_compiled(
    function: Callable[..., Any],
    shape: tuple[Hashable, ...],
    device: torch.device,
    model: nn.Module,
    *args: Any,
    cuda_graphs: bool = True,
) -> Any:
    """
    Calls a function of the module level, compiled for the shapes of its arguments.

    On a GPU what it returns lies in the memory of a CUDA graph, where the next compiled call overwrites it: copy what
    is needed longer.

    Args:
        function (`Callable`): is compiled.
        shape (`tuple[Hashable, ...]`): all that differs from call to call in the shapes of its arguments, and in
            those that are no tensors.
        device (`torch.device`): of them.
        model (`nn.Module`): its first argument.
        args: the others.
        cuda_graphs (`bool`): not where the caller records one that this call is part of.
    """
    mode = None
    if cuda_graphs and device.type == "cuda" and BACKEND == "inductor":
        mode = "reduce-overhead"  # CUDA graphs
        torch.compiler.cudagraph_mark_step_begin()
    of_model = _compiled.setdefault(model, {})
    key = (function, shape, BACKEND, mode)
    if key not in of_model:
        of_model[key] = _compile(function, mode)
    return of_model[key](model, *args)


def _compile(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # Dynamo keeps its compilations with the code object.
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, backend=BACKEND, mode=mode, dynamic=False)


@contextmanager
def compiled_decoder(decoder: nn.Module, shape: tuple[int, ...], cuda_graphs: bool = True) -> Iterator[None]:
    """Compiles the forward of a decoder as long as this is open, see [`run_compiled`]. Hooks on the decoder itself run
    around it."""

    def forward(**kwargs: Any) -> Any:
        device = kwargs["position_ids"].device
        return run_compiled(_decoder_forward, shape, device, decoder, kwargs, cuda_graphs=cuda_graphs)

    decoder.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.forward


def _decoder_forward(decoder: nn.Module, kwargs: dict[str, Any]) -> Any:
    return type(decoder).forward(decoder, **kwargs)


def has_compiled_part(target: PreTrainedModel) -> bool:
    """Whether somebody has compiled a target, or modules of it, before."""
    return any(
        # `vars`, since modules answer slowly for what they lack.
        vars(module).get("_compiled_call_impl") is not None
        or isinstance(module, torch._dynamo.OptimizedModule)
        or hasattr(vars(module).get("forward", type(module).forward), "_torchdynamo_orig_callable")
        for module in target.modules()
    )


__all__ = ["compiled_decoder", "has_compiled_part", "is_compiled", "run_compiled"]
