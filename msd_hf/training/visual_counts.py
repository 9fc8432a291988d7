"""How many visual positions the samples of a training have, which `max_visual_rows="auto"` of a call reads later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch


_SHARE = 0.95  # a few samples with many pictures do not make a draft used to them


class VisualCounts:
    """
    Counts the visual positions of samples that have any.

    Args:
        most (*optional*): the most visual positions of a sample that training reads. The others do not count.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._counts: Counter[int] = Counter()
        self._unread: list[torch.Tensor] = []  # on the device, so that training does not wait for them

    def add(self, visual_mask: torch.Tensor) -> None:
        """Adds the samples of a batch; `visual_mask` `[B, L]` is true at visual positions."""
        counts = visual_mask.sum(1)
        self._unread.append(counts if self._most is None else counts.clamp(max=self._most))

    def read(self) -> Counter[int]:
        """How many samples have each number of visual positions."""
        if self._unread:
            self._counts.update(number for number in torch.cat(self._unread).tolist() if number)
            self._unread = []
        return self._counts

    def saved(self) -> dict[str, int]:
        """The counts as JSON can hold them."""
        return {str(number): count for number, count in sorted(self.read().items())}

    def restore(self, saved: Mapping[str, int]) -> None:
        """Goes on from what `saved` has returned."""
        self._counts = Counter({int(number): count for number, count in saved.items()})
        self._unread = []

    def usual_most(self) -> int | None:
        """The 95th percentile of the samples; `None` if no sample has a visual position."""
        counts = self.read()
        left = _SHARE * counts.total()
        for number in sorted(counts):
            left -= counts[number]
            if left <= 1e-9:
                return number
        return None


__all__ = ["VisualCounts"]
