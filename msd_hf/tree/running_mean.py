"""A mean that follows what changes."""

from __future__ import annotations

from typing import Any

from .state import number


_FORGETTING = 0.97  # factor on the weight of old values at each new value


class RunningMean:
    """A mean in which old values lose weight."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        """Adds a value of weight 1."""
        self.total = self.total * _FORGETTING + value
        self.weight = self.weight * _FORGETTING + 1.0

    @property
    def value(self) -> float | None:
        """The mean; `None` before the first value."""
        return self.total / self.weight if self.weight else None

    def state(self) -> list[float]:
        """Total and weight, for a file."""
        return [self.total, self.weight]

    @classmethod
    def of_state(cls, state: Any, most: float) -> RunningMean:
        """The mean of a `state()`, whose values count no more than `most` new ones."""
        total, weight = (number(value) for value in state)
        made = cls()
        share = min(1.0, most / weight) if weight else 0.0
        made.total, made.weight = total * share, weight * share
        return made


__all__ = ["RunningMean"]
