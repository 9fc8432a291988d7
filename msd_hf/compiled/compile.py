"""Forwards of fixed shapes under `torch.compile`: as CUDA graphs on a GPU, as larger kernels on a CPU."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import MSDUnsupportedError


BACKEND = "inductor"


def is_compiled(generation_config: Any) -> bool:
    """Whether a draft's generation config asks for compiled forwards.

    Raises:
        MSDUnsupportedError: when `compile` is not a boolean.
    """
    value = getattr(generation_config, "compile", None)
    if value not in (None, False, True):
        raise MSDUnsupportedError(f"`draft.generation_config.compile` must be True or False, got {value!r}.")
    return bool(value)


class CompiledFunctions:
    """Keeps the compiled functions of a pair, by function and shapes.

    Dynamo gets a copy of the function for each shape. With a single copy it would test all compilations at each call,
    and would compile no more than eight.
    """

    def __init__(self) -> None:
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def run(
        self,
        function: Callable[..., Any],
        shape: tuple[Hashable, ...],
        device: torch.device,
        *args: Any,
        cuda_graphs: bool = True,
    ) -> Any:
        """
        Calls a module-level function, compiled once for these shapes. Its code object is copied, so a closure would
        lose its variables.

        On a GPU the result lies in the memory of a CUDA graph, which the next compiled call overwrites: copy what is
        needed longer.

        Args:
            function (`Callable`): the function.
            shape (`tuple[Hashable, ...]`): all sizes in the shapes of the arguments that differ from call to call, and
                all arguments that do so and are not tensors.
            device (`torch.device`): device of the arguments.
            args: arguments of the function.
            cuda_graphs (`bool`): `False` where the caller records a graph that this call is part of.
        """
        mode = None
        if cuda_graphs and device.type == "cuda" and BACKEND == "inductor":
            mode = "reduce-overhead"  # CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
        key = (function, shape, BACKEND, mode)
        if key not in self._functions:
            self._functions[key] = _compile(function, mode)
        return self._functions[key](*args)

    @contextmanager
    def compiled_decoder(self, decoder: nn.Module, shape: tuple[int, ...], cuda_graphs: bool = True) -> Iterator[None]:
        """Replaces the forward of a decoder by compiled code inside the block. Hooks on the decoder still run, outside
        that code. `shape` and `cuda_graphs` are arguments of `run`."""

        def forward(**kwargs: Any) -> Any:
            device = kwargs["position_ids"].device
            return self.run(_decoder_forward, shape, device, decoder, kwargs, cuda_graphs=cuda_graphs)

        decoder.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del decoder.forward


def _compile(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # Dynamo keeps its compilations with the code object, so each compilation gets a code object of its own.
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, backend=BACKEND, mode=mode, dynamic=False)


def _decoder_forward(decoder: nn.Module, kwargs: dict[str, Any]) -> Any:
    return type(decoder).forward(decoder, **kwargs)


def has_compiled_part(target: PreTrainedModel) -> bool:
    """Whether the user has compiled the target or one of its modules."""
    return any(
        # `vars` is faster than `getattr`, which searches all parameters of a module for a missing attribute.
        vars(module).get("_compiled_call_impl") is not None
        or isinstance(module, torch._dynamo.OptimizedModule)
        or hasattr(vars(module).get("forward", type(module).forward), "_torchdynamo_orig_callable")
        for module in target.modules()
    )


__all__ = ["CompiledFunctions", "has_compiled_part", "is_compiled"]
