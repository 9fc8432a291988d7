"""The parts of a target that its user has compiled, and how to run them uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .stand_in import own_method


@dataclass(frozen=True)
class CompiledPart:
    """
    A compiled method.

    Args:
        module (`nn.Module`): the module that it belongs to.
        name (`str`): name of the method.
    """

    module: nn.Module
    name: str


def compiled_parts(target: PreTrainedModel) -> list[CompiledPart]:
    """The methods of a target and its modules that the user has compiled: by `module.compile()`, as
    `torch.compile(module)`, or as `torch.compile(module.forward)`."""
    parts = []
    uncompiled_kinds = set()  # classes whose `forward` is not compiled
    for module in target.modules():
        # `vars` is faster than `getattr`, which searches all parameters of a module for a missing attribute.
        attributes = vars(module)
        if attributes.get("_compiled_call_impl") is not None:
            parts.append(CompiledPart(module, "_compiled_call_impl"))
        elif type(module) in uncompiled_kinds and "forward" not in attributes:
            continue
        elif isinstance(module, torch._dynamo.OptimizedModule) or _is_compiled(
            own_method(module, "forward") or type(module).forward
        ):
            parts.append(CompiledPart(module, "forward"))
        elif "forward" not in attributes:
            uncompiled_kinds.add(type(module))
    return parts


def run_part(module: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a part without its compilation. `method` is the compiled method."""
    if vars(module).get("_compiled_call_impl") is not None:
        return module._call_impl(*args, **kwargs)
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod(*args, **kwargs)
    function: Any = getattr(method, "__func__", method)
    if function is not method:  # a method of the class
        args = (module, *args)
    return function._torchdynamo_orig_callable(*args, **kwargs)


def uncompiled(module: Any) -> Any:
    """A module without the wrapper that `torch.compile(module)` puts around it."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


def _is_compiled(method: Any) -> bool:
    return hasattr(method, "_torchdynamo_orig_callable")


__all__ = ["CompiledPart", "compiled_parts", "run_part", "uncompiled"]
