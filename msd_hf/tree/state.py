"""Checks numbers that a file of experience holds."""

from __future__ import annotations

import math
from typing import Any


_MOST = 1e12


def number(value: Any) -> float:
    """
    A finite number of at least 0.

    Raises:
        ValueError: when it is not.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= _MOST:
        raise ValueError(f"it holds {str(value)[:40]!r} where a number of at least 0 is expected.")
    return float(value)


def count(value: Any) -> int:
    """A whole number of at least 0, given as such or as the name of a JSON field."""
    return int(number(int(value) if isinstance(value, str) else value))


__all__ = ["count", "number"]
