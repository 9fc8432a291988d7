"""Visual rows that a draft does not read in training, so that it is used to any number of them.

In generation, a budget (`max_visual_rows`) keeps evenly spaced visual rows. Here it is drawn for each sample.
"""

from __future__ import annotations

import random

import torch

from .visual_row_budget import rows_beyond


def unread_rows(visual_mask: torch.Tensor, numbers: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """
    Draws the visual rows that a budget would leave out.

    Args:
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): the visual rows.
        numbers (`torch.LongTensor` of shape `[B]`): numbers of the samples in the run, which give the draws, so that
            they do not change with the number of processes or when a run is resumed.
        share: the probability that a sample has a budget. The budget is between 1 and the number of its visual rows;
            its logarithm is uniform, so that small and large budgets are equally frequent.
        seed: seed of the run.

    Returns:
        `torch.BoolTensor` of shape `[B, L]`.
    """
    budgets = []
    for number, count in zip(numbers.tolist(), visual_mask.sum(1).tolist(), strict=True):
        draw = random.Random(f"visual rows/{seed}/{number}")
        has_budget, size = draw.random() < share, draw.random()
        budgets.append(round(count**size) if has_budget else None)
    return rows_beyond(visual_mask, budgets)


__all__ = ["unread_rows"]
