"""Chains on layers whose recurrence is of an unknown kind: the layer's mixer runs again over the accepted tokens.

A mixer is the module that reads and writes a layer's states. In the verification of a chain it runs as over any text,
and its inputs are kept. If only a part of the chain is accepted, the mixers run again over that part, from the states
before the chain. The rest of the target runs once.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compat import CACHE_NAME


def mixers_of(decoder: nn.Module, numbers: Collection[int]) -> list[nn.Module]:
    """
    The modules of a decoder that can read and write recurrent states in a cache: the innermost ones that know the
    number of their layer and take a cache.

    Args:
        decoder (`nn.Module`): the decoder.
        numbers (`Collection[int]`): the numbers of its layers that have states.
    """
    return [
        module
        for module in decoder.modules()
        if _is_of_layer(module)
        and module.layer_idx in numbers
        and not any(_is_of_layer(part) for part in module.modules() if part is not module)
    ]


def _is_of_layer(module: nn.Module) -> bool:
    takes_cache = CACHE_NAME in inspect.signature(module.forward).parameters
    return takes_cache and isinstance(getattr(module, "layer_idx", None), int)


@dataclass
class MixerCall:
    """
    One call of a mixer, over a chain of tokens of one sequence.

    Args:
        mixer (`nn.Module`): the module.
        args, kwargs: what it was called with.
        num_tokens (`int`): number of tokens of the chain, N.
    """

    mixer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_tokens: int

    def repeat(self, count: int) -> None:
        """Runs the mixer over the first `count` tokens. It changes the states in the cache."""
        args, kwargs = self._first(self.args, count), self._first(self.kwargs, count)
        self.mixer(*args, **kwargs)

    def _first(self, value: Any, count: int) -> Any:
        """Of inputs with one entry for each token, `[1, N, ...]`, those of the first `count` tokens."""
        if isinstance(value, torch.Tensor):
            return value[:, :count] if value.dim() > 1 and value.shape[1] == self.num_tokens else value
        if isinstance(value, dict):
            return {name: self._first(entry, count) for name, entry in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._first(entry, count) for entry in value)
        return value


__all__ = ["MixerCall", "mixers_of"]
