"""Functions of transformers that are wrapped, and put back later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass
class _Wrapped:
    owner: Any  # a class or a module
    name: str
    original: Any
    wrapper: Any


class Wrappers:
    """Keeps the functions that were wrapped, so that they can be put back."""

    def __init__(self) -> None:
        self._wrapped: list[_Wrapped] = []

    def __bool__(self) -> bool:
        return bool(self._wrapped)

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Puts `make(original)` in place of a function of a class or a module."""
        original = vars(owner)[name]
        wrapper = make(original)
        self._wrapped.append(_Wrapped(owner, name, original, wrapper))
        setattr(owner, name, wrapper)

    def put_back(self) -> None:
        """Puts every original back. A function that another library has replaced since then stays, because removing
        our wrapper would remove the other library's too."""
        for wrapped in self._wrapped:
            if vars(wrapped.owner)[wrapped.name] is wrapped.wrapper:
                setattr(wrapped.owner, wrapped.name, wrapped.original)
            else:
                place = f"{wrapped.owner.__name__}.{wrapped.name}"
                logger.warning(f"`{place}` was replaced by another library after msd_hf; left as it is.")
        self._wrapped.clear()


__all__ = ["Wrappers"]
