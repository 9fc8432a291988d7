"""Methods of single modules that a call of `generate` steps into while other calls use the same modules.

Calls may share a target, in threads or nested in hooks. Hooks that come and go are seen half by another thread that
runs the module at this moment, and replaced functions are run by it. A stand-in takes the place of one method of one
module. It is set and removed in one step, it finds the call that it serves in a context variable, and it passes every
other call on. So it makes no difference to another call when the stand-in comes or goes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


# (the module, its method, arguments, keyword arguments) -> the result. Finds its call in a context variable.
Handler = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_lock = threading.Lock()


class StandIn:
    """
    Stands in for a method of a module.

    Args:
        module (`nn.Module`): the module.
        name (`str`): name of the method.
        handle (`Callable`): is called in place of the method.

    Attributes:
        method: what stands there without the stand-in: a method of the class, or a function that other code has put
            in the module.
        is_of_class (`bool`): whether `method` is a method of the class.
    """

    def __init__(self, module: nn.Module, name: str, handle: Handler):
        self.module, self.name, self.handle = module, name, handle
        self.method = getattr(module, name)
        self.is_of_class = name not in vars(module)
        self.num_users = 0
        functools.update_wrapper(self, self.method, updated=())  # signatures are read from it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A user's own compilation must not contain the handler. Without users this stand-in is a leftover within
        # other code that has wrapped it.
        if torch.compiler.is_dynamo_compiling() or not self.num_users:
            return self.method(*args, **kwargs)
        return self.handle(self.module, self.method, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module has its own method, without a stand-in.
        return getattr, (self.module, self.name)


@contextmanager
def standing_in(module: nn.Module, name: str, handle: Handler) -> Iterator[None]:
    """
    Keeps a stand-in in place inside the block. Blocks of several calls share one, and the last to end removes it.

    Args:
        module (`nn.Module`): the module.
        name (`str`): name of the method. All blocks for this method must have the same `handle`.
        handle (`Callable`): is called in place of the method.
    """
    attributes = vars(module)
    with _lock:
        present = attributes.get(name)
        stand_in = present if isinstance(present, StandIn) else StandIn(module, name, handle)
        attributes[name] = stand_in
        stand_in.num_users += 1
    try:
        yield
    finally:
        with _lock:
            stand_in.num_users -= 1
            # Other code may have wrapped the stand-in meanwhile. It stays then, and passes all calls on.
            if not stand_in.num_users and attributes.get(name) is stand_in:
                if stand_in.is_of_class:
                    del attributes[name]
                else:
                    attributes[name] = stand_in.method


def own_method(module: nn.Module, name: str) -> Any:
    """What a module has under a name in its own attributes, stand-ins left aside; `None` if nothing."""
    method = vars(module).get(name)
    if isinstance(method, StandIn):
        return None if method.is_of_class else method.method
    return method


__all__ = ["Handler", "StandIn", "own_method", "standing_in"]
