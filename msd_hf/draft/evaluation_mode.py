"""A draft's evaluation mode, which calls of `generate` in several threads share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .interface import Draft


@dataclass
class _Mode:
    """
    Args:
        num_calls (`int`): calls under way.
        training (`list[nn.Module]`): the modules that were in training mode before the first of them.
    """

    num_calls: int = 0
    training: list[nn.Module] = field(default_factory=list)


_modes: weakref.WeakKeyDictionary[Any, _Mode] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(draft: Draft) -> Iterator[None]:
    """Keeps the draft in evaluation mode inside the block. A new draft is in training mode, in which dropout would use
    up random numbers of the call. The last of several calls to end puts the mode back."""
    with _lock:
        mode = _modes.setdefault(draft, _Mode())
        if not mode.num_calls:
            mode.training = [module for module in draft.modules() if module.training]
            draft.eval()
        mode.num_calls += 1
    try:
        yield
    finally:
        with _lock:
            mode.num_calls -= 1
            if not mode.num_calls:
                for module in mode.training:
                    module.training = True
                mode.training = []


__all__ = ["evaluating"]
