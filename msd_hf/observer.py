"""The points of the decoding loop at which a measurement can observe it or step in.

A measurement opens `observing(...)` around a call of `generate`. Calls of other threads and calls outside the block
are not observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Observer:
    """
    The functions of a measurement, which the decoding loop calls.

    Args:
        phase (`Callable`, *optional*): called with the name of a phase of the loop. Returns a context manager, inside
            which the phase runs.
        on_logits (`Callable`, *optional*): gets each candidate tree and the target's logits `[B, N, V]` at its nodes,
            and may change them in place.
        on_verify (`Callable`, *optional*): called as `on_verify(verify, tree, cache)` in place of each verification.
            `verify(tree)` is the verification; its result is what the loop gets.
        notices (`bool`): whether a draft that is of no use is warned about.
    """

    phase: Callable[[str], AbstractContextManager[None]] | None = None
    on_logits: Callable[[Any, Any], None] | None = None
    on_verify: Callable[[Callable[[Any], Any], Any, Any], Any] | None = None
    notices: bool = True


_NOBODY = Observer()
_observer: ContextVar[Observer] = ContextVar("msd_hf.observer", default=_NOBODY)
_NOT_TIMED: AbstractContextManager[None] = nullcontext()


@contextmanager
def observing(**parts: Any) -> Iterator[None]:
    """Observes the calls of `generate` inside the block.

    Args:
        parts: fields of [`Observer`]. An outer block stays in force for the fields that are not given.
    """
    token = _observer.set(replace(_observer.get(), **parts))
    try:
        yield
    finally:
        _observer.reset(token)


def current_observer() -> Observer:
    """The observer that is in force where this function is called."""
    return _observer.get()


def phase(name: str) -> AbstractContextManager[None]:
    """Returns a context manager that marks its block as the phase `name` of the decoding loop."""
    enter = _observer.get().phase
    return _NOT_TIMED if enter is None else enter(name)


__all__ = ["Observer", "current_observer", "observing", "phase"]
