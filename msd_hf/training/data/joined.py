"""Several data sets as one, each in its share."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from numbers import Real
from typing import Any

from ...errors import MSDError, shown
from .conversation import Conversation


class JoinedConversations:
    """
    A map-style data set of the [`Conversation`]s of several data sets.

    Args:
        parts: the data sets, each with a length.
        weights (*optional*): the share of each part in a pass, in any unit. A pass is as long as it takes to read
            every sample of every part, so parts that are small for their weight are repeated in it. Without weights
            each sample comes once.

    Raises:
        MSDError: when weights are not one positive number a part, or a part is empty or streamed.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None):
        self.parts, self.weights = list(parts), None if weights is None else _numbers(weights)
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise MSDError(
                f"There are {len(self.parts)} data sets, but {len(self.weights)} weights: give one for each."
            )
        if any(not 0 < weight < math.inf for weight in self.weights or ()):
            raise MSDError(f"Weights of data sets must be above 0 and finite, got {self.weights}.")
        sizes = [len(part) for part in self.parts]
        empty = [part.name for part, size in zip(self.parts, sizes, strict=True) if size == 0]
        if empty:
            raise MSDError(f"{empty[0]} holds no samples.")
        if self.weights is not None:
            passes = max(size / weight for size, weight in zip(sizes, self.weights, strict=True))
            sizes = [max(size, round(passes * weight)) for size, weight in zip(sizes, self.weights, strict=True)]
        self._ends = list(accumulate(sizes))
        if self._ends[-1] > sys.maxsize:  # `len` knows no larger number
            raise MSDError(f"The weights {self.weights} make a pass of {self._ends[-1]:.0e} samples: set them closer.")

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return ", ".join(part.name for part in self.parts)

    @property
    def image_folder(self) -> Any:
        """The image folder of all parts; `None` if they have several."""
        folders = {part.image_folder for part in self.parts}
        return folders.pop() if len(folders) == 1 else None

    @property
    def fingerprint(self) -> str:
        """sha256 of the parts and their weights."""
        content = [[part.fingerprint for part in self.parts], self.weights]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, but number {index} was asked for.")
        index %= len(self)
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        return part[(index - (self._ends[number - 1] if number else 0)) % len(part)]


def _numbers(weights: Any) -> list[float]:
    numbers = list(weights) if isinstance(weights, Iterable) else [weights]
    if not isinstance(weights, Iterable) or not all(isinstance(number, Real) for number in numbers):
        raise MSDError(f"Weights of data sets are a list with a number for each, got {shown(weights)}.")
    return numbers


__all__ = ["JoinedConversations"]
