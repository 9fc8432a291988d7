"""Functions in place of plain modules: calling a module takes as long as a small operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm


TensorFunction = Callable[[torch.Tensor], torch.Tensor]


def function_of(module: Any) -> TensorFunction:
    """Returns a function that computes what a module computes, or the module itself if it is wrapped, quantised,
    hooked or of an unknown kind."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return module
    if type(getattr(module, "weight", None)) is not nn.Parameter:
        return module
    if type(module) is nn.Linear:
        return partial(functional.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.Embedding and module.max_norm is None:
        return partial(torch.embedding, module.weight)
    if type(module) is LlamaRMSNorm:
        return _norm_function(module.weight, module.variance_epsilon)
    return module


def function_at(module: Any, draft: Any) -> TensorFunction | None:
    """`function_of(module)` if the weight of the module has the device and dtype of the draft, else `None`."""
    is_at_hand = module.weight.device == draft.device and module.weight.dtype == draft.dtype
    return function_of(module) if is_at_hand else None


def _norm_function(weight: torch.Tensor, epsilon: float) -> TensorFunction:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return partial(functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=epsilon)
    # On a CPU `rms_norm` consists of more operations than this.
    least = torch.full((1, 1), epsilon, dtype=weight.dtype)

    def normed(states: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return states * torch.addcmul(least, length, length, value=1 / states.shape[-1]).rsqrt_() * weight

    return normed


__all__ = ["TensorFunction", "function_at", "function_of"]
