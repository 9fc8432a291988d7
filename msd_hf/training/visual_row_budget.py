"""The visual rows that a budget leaves out in training: the same ones as in generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..drafting.visual_rows import evenly_spaced


def rows_beyond(visual_rows: torch.Tensor, budgets: Sequence[int | None]) -> torch.Tensor:
    """
    The visual rows that go, so that evenly spaced ones are left.

    Args:
        visual_rows (`torch.BoolTensor` of shape `[B, L]`): the visual rows.
        budgets: the most visual rows of each sample; `None`: all.

    Returns:
        `torch.BoolTensor` of shape `[B, L]`.
    """
    visual = visual_rows.cpu()
    beyond = torch.zeros_like(visual)
    for row, budget in enumerate(budgets):
        places = visual[row].nonzero().squeeze(1)
        if budget is not None and budget < len(places):
            beyond[row, places] = True
            beyond[row, places[evenly_spaced(len(places), budget)]] = False
    return beyond.to(visual_rows.device)


def kept_visual_positions(visual_mask: torch.Tensor, budget: int | None) -> torch.Tensor:
    """
    The visual positions `[L]` of a sample whose embeddings a draft with a budget reads. Row j of a draft reads the
    embedding at position j + 1, so no row reads that of the first position.

    Args:
        visual_mask (`torch.BoolTensor` of shape `[L]`): the visual positions.
        budget: the most visual rows; `None`: all.
    """
    kept = visual_mask.clone()
    kept[1:] &= ~rows_beyond(visual_mask[1:].unsqueeze(0), [budget])[0]
    return kept


__all__ = ["kept_visual_positions", "rows_beyond"]
