"""Forwards of fixed shapes under `torch.compile`: as CUDA graphs on a GPU, as larger kernels on a CPU."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import MSDUnsupportedError, shown


BACKEND = "inductor"


def is_compiled(generation_config: Any) -> bool:
    """Whether a draft's generation config asks for compiled forwards.

    Raises:
        MSDUnsupportedError: when `compile` is not a boolean.
    """
    value = getattr(generation_config, "compile", None)
    if value not in (None, False, True):
        raise MSDUnsupportedError(f"`draft.generation_config.compile` must be True or False, got {shown(value)}.")
    return bool(value)


class CompiledFunctions:
    """Keeps the compiled functions of a pair, by function and shapes.

    Dynamo gets a copy of the function for each shape. With a single copy it would test all compilations at each call,
    and would compile no more than eight.
    """

    def __init__(self) -> None:
        self._functions: dict[Hashable, Callable[..., Any]] = {}
        self._lock = threading.Lock()

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
        with self._lock:  # so that threads do not compile the same function twice
            if key not in self._functions:
                self._functions[key] = _compile(function, mode)
            compiled = self._functions[key]
        with _unnoticed():
            return compiled(*args)

    def run_decoder(
        self, decoder: nn.Module, inputs: dict[str, Any], shape: tuple[int, ...], cuda_graphs: bool = True
    ) -> Any:
        """Runs the forward of a decoder as compiled code, without the hooks on the decoder itself. `inputs` are the
        decoder's, by name; `shape` and `cuda_graphs` are arguments of `run`."""
        device = inputs["position_ids"].device
        return self.run(_decoder_forward, shape, device, decoder, inputs, cuda_graphs=cuda_graphs)


def _compile(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # Dynamo keeps its compilations with the code object, so each compilation gets a code object of its own.
    if _hide_session not in torch._dynamo.callback_handler.start_callbacks:
        torch._dynamo.callback_handler.register_start_callback(_hide_session)
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, backend=BACKEND, mode=mode, dynamic=False)


_sessions = threading.local()


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Keeps compilations inside the block from being noticed by other threads. For the time of a compilation torch
    (from 2.13) lets `torch.compiler.is_compiling()` be true in all threads, and models of transformers then keep the
    states of other calls in a global variable."""
    before = getattr(_sessions, "is_ours", False)
    _sessions.is_ours = True
    try:
        yield
    finally:
        _sessions.is_ours = before


def _hide_session(_: Any) -> None:
    if getattr(_sessions, "is_ours", False) and getattr(torch.compiler, "_is_compiling_flag", False):
        torch.compiler._is_compiling_flag = False  # torch sets it back when the compilation ends


def _decoder_forward(decoder: nn.Module, kwargs: dict[str, Any]) -> Any:
    return type(decoder).forward(decoder, **kwargs)


__all__ = ["CompiledFunctions", "is_compiled"]
