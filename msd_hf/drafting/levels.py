"""The levels of a candidate tree, one after the other (paper section 3.2; EAGLE-2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..tree.growth import TreeGrowth
from ..tree.policy import TreePolicy


def grow_levels(
    growth: TreeGrowth,
    states: torch.Tensor,
    policy: TreePolicy,
    top_k: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    forward: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """
    Grows a tree level by level, to its full depth or until the policy ends the growth.

    Args:
        growth (`TreeGrowth`): the growth of a tree that consists of its root so far.
        states (`torch.Tensor` of shape `[B, 1, H]`): the draft's output at the root.
        policy (`TreePolicy`): chooses how many nodes of each level are expanded.
        top_k (`Callable`): log-probabilities and tokens `[B, F, K]` of the best candidates after states `[B, F, H]`.
        forward (`Callable`): the draft's outputs `[B, F, H]` at the frontier of the growth, given the number of the
            level and the outputs at the previous frontier.
    """
    settings = growth.settings
    growth.expand(*top_k(states, settings.top_k))
    for level in range(settings.depth):
        width = policy.width(growth)
        if width == 0:
            return
        if width < settings.top_k:
            growth.narrow(width)
        states = forward(level, states)
        growth.expand(*top_k(states, settings.top_k))


__all__ = ["grow_levels"]
