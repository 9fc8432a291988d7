"""The functions of transformers that recurrent layers call, computed over candidate trees for single forwards.

A layer calls a few functions of its model's file by name. Functions stand in their place that look for the nodes of a
tree in a context variable, and call what they replace if there is none. So layers of every model that uses these
functions are served, and other calls of the same model, in any thread, see no difference.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .convolution import tree_convolution
from .gated_delta import tree_gated_delta
from .mamba1 import Mamba1Heads, tree_mamba1
from .mamba2 import tree_mamba2
from .nodes import TreeNodes


_current: ContextVar[TreeNodes | None] = ContextVar("msd_hf.tree_nodes", default=None)
_replaced: dict[tuple[str, str], Callable[..., Any]] = {}  # module and name -> the function that we have put there
_lock = threading.Lock()


@contextmanager
def along_tree(nodes: TreeNodes | None) -> Iterator[None]:
    """Inside the block recurrent layers of this thread run along a tree; `None` ends an outer block.

    The layers' model must have been given to [`allow_trees`].
    """
    token = _current.set(nodes)
    try:
        yield
    finally:
        _current.reset(token)


def has_known_kernels(decoder: nn.Module) -> bool:
    """Whether a file of transformers that a decoder's modules come from has a function that can run along trees."""
    return any(True for _ in _functions_of(decoder))


def _functions_of(decoder: nn.Module) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """The functions that can run along trees in the files of a decoder's modules: file, name, function."""
    for file in {type(module).__module__ for module in decoder.modules()}:
        for name in _KERNELS:
            function = getattr(sys.modules.get(file), name, None)
            if function is not None:
                yield file, name, function


def allow_trees(decoder: nn.Module) -> None:
    """Lets [`along_tree`] replace the functions that recurrent layers of a decoder call. Other calls get the functions
    that stood there before."""
    with _lock:
        for file, name, function in _functions_of(decoder):
            if function is not _replaced.get((file, name)):
                _replaced[file, name] = _replaceable(function, _KERNELS[name])
                setattr(sys.modules[file], name, _replaced[file, name])


def restore_kernels() -> None:
    """Puts back all functions that [`allow_trees`] has replaced, unless other code has replaced ours."""
    with _lock:
        for (file, name), function in _replaced.items():
            if getattr(sys.modules.get(file), name, None) is function:
                setattr(sys.modules[file], name, function.__wrapped__)  # type: ignore[attr-defined]
        _replaced.clear()


def _replaceable(function: Callable[..., Any], along: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # torch.compile cannot read a context variable. Forwards over trees of recurrent layers are not compiled.
        if not torch.compiler.is_dynamo_compiling():
            nodes = _current.get()
            if nodes is not None:
                return along(nodes, *args, **kwargs)
        return function(*args, **kwargs)

    return run


def _convolution(
    nodes: TreeNodes,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`hidden_states` `[B, C, S + N]` are the cached columns and the nodes. Returns the outputs at the nodes alone,
    which are all that a layer reads."""
    if hidden_states is nodes.convolved:
        nodes.convolved = None
    num_nodes = nodes.parents.shape[1]
    windows = nodes.windows(weight.shape[-1], hidden_states.shape[2] - num_nodes, hidden_states.device)
    outputs = tree_convolution(hidden_states, windows, weight, bias)
    if activation is not None:
        outputs = ACT2FN[activation](outputs)
    return outputs.to(hidden_states.dtype)


def _gated_delta(
    nodes: TreeNodes,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, repeats = query.dtype, value.shape[2] // key.shape[2]
    query, key = (part.float().repeat_interleave(repeats, dim=2) for part in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (query, key))
    query = query * query.shape[-1] ** -0.5
    _, ancestors = nodes.on(query.device)
    outputs, nodes.kept = tree_gated_delta(
        query, key, value.float(), g.float(), beta.float(), initial_state.float(), ancestors
    )
    return outputs.to(dtype), initial_state


def _mamba2(
    nodes: TreeNodes,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    # `dt_limit` is ignored as in the step of a single token, with which the target alone decodes.
    dtype = hidden_states.dtype
    dt = _step_sizes(dt, dt_bias, dt_softplus)
    _, ancestors = nodes.on(hidden_states.device)
    outputs, nodes.kept = tree_mamba2(
        hidden_states.float(),
        dt.float(),
        A.float(),
        B.float(),
        C.float(),
        None if D is None else D.float(),
        initial_states.float(),
        ancestors,
    )
    return outputs.to(dtype), initial_states


def _mamba1(
    nodes: TreeNodes,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert nodes.state is not None
    dtype = hidden_states.dtype
    dt = _step_sizes(dt.mT, delta_bias, delta_softplus)
    parents, _ = nodes.on(hidden_states.device)
    # Zamba scans each head by itself, `[B, heads, C, S]`, and hands over all new states at the end.
    earlier = nodes.kept if isinstance(nodes.kept, Mamba1Heads) else Mamba1Heads()
    state = nodes.state if nodes.state.dim() == 3 else nodes.state[:, len(earlier.heads)]
    outputs, kept = tree_mamba1(
        hidden_states.mT.float(),
        dt.float(),
        A.float(),
        B.mT.float(),
        C.mT.float(),
        None if D is None else D.float(),
        state.float(),
        parents,
    )
    nodes.kept = kept if nodes.state.dim() == 3 else Mamba1Heads([*earlier.heads, kept])
    outputs = outputs.mT
    if z is not None:
        outputs = outputs * functional.silu(z)
    return outputs.to(dtype), state


def _step_sizes(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return functional.softplus(dt) if softplus else dt


_KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _gated_delta,
    "chunk_kimi_delta_attention": _gated_delta,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba1,
}

__all__ = ["allow_trees", "along_tree", "has_known_kernels", "restore_kernels"]
