"""Random numbers for the rows of a batch that advance at different paces."""

from __future__ import annotations

import torch


class SamplingNoise:
    """
    Draws tokens as `torch.multinomial` does for a whole batch at each step, for one row at a time.

    `torch.multinomial` with one sample divides the probabilities by exponential noise, drawn for all rows at once, and
    takes the largest. Here the noise of a step is drawn when the first row gets there, and kept until the last one
    does, so that each row gets the token that it gets in step with the others, from the same seed.

    Args:
        num_rows (`int`): rows of the batch.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._first = 0  # step that the first of `_steps` belongs to
        self._steps: list[torch.Tensor] = []

    def choose(self, probs: torch.Tensor, row: int, step: int) -> torch.Tensor:
        """
        The token `[1]` of one row.

        Args:
            probs (`torch.Tensor` of shape `[1, V]`): probabilities.
            row (`int`): of the batch.
            step (`int`): tokens that the row has emitted before.

        Raises:
            RuntimeError: when they are none, as `torch.multinomial` does.
        """
        if not ((probs.max() < torch.inf) & (probs.min() >= 0)).item():
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        while len(self._steps) <= step - self._first:
            noise = torch.empty(self.num_rows, probs.shape[1], dtype=probs.dtype, device=probs.device)
            self._steps.append(noise.exponential_())
        return (probs / self._steps[step - self._first][row]).argmax(-1)

    def forget(self, step: int) -> None:
        """Drops what comes before a step, which no row will ask for any more."""
        del self._steps[: max(0, step - self._first)]
        self._first = max(self._first, step)


__all__ = ["SamplingNoise"]
