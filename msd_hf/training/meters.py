"""The metrics of a draft's training that are logged besides the loss, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from .losses import NUM_RANKS, LossSums


class LossMeter:
    """
    Accumulates the loss terms, the agreement with the target and the share of visual samples until it is read.

    Args:
        names: the loss terms.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        # In this order: loss terms, agreement, number of rows, number of visual samples, number of samples.
        self._sums = torch.zeros(len(names) + NUM_RANKS + 3, dtype=torch.float64)

    def add(self, sums: LossSums, is_visual: torch.Tensor) -> None:
        """Adds a batch; `is_visual` `[B]` says which of its samples are visual."""
        terms = [sums.terms[name].detach() for name in self.names]
        values = [*terms, *sums.agreement, is_visual.sum()]
        counted = torch.stack([value.double().to(is_visual.device) for value in values])
        sizes = counted.new_tensor([sums.num_rows, len(is_visual)])
        # The sums stay on the device, so that only `read` waits for it.
        self._sums = self._sums.to(counted.device) + torch.cat([counted[:-1], sizes[:1], counted[-1:], sizes[1:]])

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all processes and resets the meter. All processes must call it together."""
        total = accelerator.reduce(self._sums.float().to(accelerator.device)).tolist()
        self._sums.zero_()
        *sums, num_rows, num_visual, num_samples = total
        if num_rows == 0:
            return {}
        names = [*self.names, *(f"top{rank}_agreement" for rank in range(1, NUM_RANKS + 1))]
        values = {name: value / num_rows for name, value in zip(names, sums, strict=True)}
        return values | {"visual_share": num_visual / num_samples}


__all__ = ["LossMeter"]
