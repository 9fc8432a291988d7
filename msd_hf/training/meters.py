"""What is logged of a draft's training besides the loss, over all processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from .losses import NUM_RANKS, LossSums


class LossMeter:
    """Both loss terms, agreement with the target and the share of visual samples since it was last read."""

    def __init__(self) -> None:
        # feature loss, token loss, agreement, rows, visual samples, samples
        self._sums = torch.zeros(2 + NUM_RANKS + 3, dtype=torch.float64)

    def add(self, sums: LossSums, is_visual: torch.Tensor) -> None:
        """Counts a batch: its sums, and which of its samples are visual `[B]`."""
        values = [sums.feature_loss.detach(), sums.token_loss.detach(), *sums.agreement, is_visual.sum()]
        counted = torch.stack([value.double().to(is_visual.device) for value in values])
        sizes = counted.new_tensor([sums.num_rows, len(is_visual)])
        # On the device: reading back belongs to the logging step.
        self._sums = self._sums.to(counted.device) + torch.cat([counted[:-1], sizes[:1], counted[-1:], sizes[1:]])

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes; starts again from zero. All processes call it at the same time."""
        total = accelerator.reduce(self._sums.float().to(accelerator.device)).tolist()
        self._sums.zero_()
        feature_loss, token_loss, *hits, num_rows, num_visual, num_samples = total
        if num_rows == 0:
            return {}
        values = {"feature_loss": feature_loss / num_rows, "token_loss": token_loss / num_rows}
        values |= {f"top{rank}_agreement": hit / num_rows for rank, hit in enumerate(hits, 1)}
        return values | {"visual_share": num_visual / num_samples}


__all__ = ["LossMeter"]
