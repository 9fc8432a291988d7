"""A mean that follows what changes."""

from __future__ import annotations


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


__all__ = ["RunningMean"]
