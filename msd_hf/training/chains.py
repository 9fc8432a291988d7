"""The expected length of drafted chains, which the speed of generation depends on, as a loss over unrolled passes."""

from __future__ import annotations

import torch


class Chains:
    """
    The chains that generation would draft from each trained row. The chain from row j has its first token at row j of
    the first pass, its second at row j + 1 of the second pass, and so on, and ends with the trained rows. A token is
    accepted if all before it are and it is accepted itself, so the expected length is the sum over the depths of the
    product of the acceptances down to there.

    Call `add` once for each pass, in order. `missing` is then the number of tokens that are expected to be refused,
    summed over the chains: 0 if each token is sure to be accepted.
    """

    def __init__(self) -> None:
        self.missing = torch.zeros(())
        self._reached: torch.Tensor | None = None  # [B, L], how probable it is that the chain at a row is accepted

    def add(self, acceptance: torch.Tensor, trained: torch.Tensor) -> None:
        """
        Adds a pass.

        Args:
            acceptance (`torch.Tensor` of shape `[R]`): how probable it is that the token of each trained row is
                accepted, if the tokens before it are.
            trained (`torch.BoolTensor` of shape `[B, L]`): the R trained rows of this pass. Row j may be one only if
                row j - 1 was one of the pass before.
        """
        reached = acceptance.new_zeros(trained.shape).masked_scatter(trained, acceptance)
        if self._reached is not None:
            before = torch.cat([torch.zeros_like(self._reached[:, :1]), self._reached[:, :-1]], dim=1)
            reached = reached * before
        self.missing = self.missing + (1 - reached[trained]).sum()
        self._reached = reached


__all__ = ["Chains"]
