"""What a measurement sees of the decoding loop, and where it steps in.

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
    The parts of a call that are observed.

    Args:
        phase (`Callable`, *optional*): gives a context manager for a phase of the loop, by its name.
        on_logits (`Callable`, *optional*): gets each candidate tree and the target's logits `[B, N, V]` at its nodes,
            and may change them in place.
        on_verify (`Callable`, *optional*): called as `on_verify(verify, tree, cache)` in place of each verification.
            `verify(tree)` is the verification; its result is what the loop gets.
    """

    phase: Callable[[str], AbstractContextManager[None]] | None = None
    on_logits: Callable[[Any, Any], None] | None = None
    on_verify: Callable[[Callable[[Any], Any], Any, Any], Any] | None = None


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
    """The observer of the block that encloses this call."""
    return _observer.get()


def phase(name: str) -> AbstractContextManager[None]:
    """Marks the block under it as a phase of the loop."""
    enter = _observer.get().phase
    return _NOT_TIMED if enter is None else enter(name)


__all__ = ["Observer", "current_observer", "observing", "phase"]
