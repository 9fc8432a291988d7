"""Random numbers for the rows of a batch that advance at different paces."""

from __future__ import annotations

import torch


class SamplingNoise:
    """
    Draws for one row at a time the tokens that `torch.multinomial` would draw for a whole batch.

    `torch.multinomial` with one sample divides the probabilities by exponential noise, drawn for all rows at once, and
    takes the largest quotient. This class draws the noise of a step when the first row reaches the step, and keeps it
    until the last row has passed. So each row gets the same token from the same seed as if all rows advanced in step.

    Args:
        num_rows (`int`): number of rows of the batch.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._first_step = 0  # step of `_noise[0]`
        self._noise: list[torch.Tensor] = []  # [B, V] for each step

    def choose(self, probs: torch.Tensor, row: int, step: int) -> torch.Tensor:
        """
        Draws the token `[1]` of one row.

        Args:
            probs (`torch.Tensor` of shape `[1, V]`): the row's probabilities.
            row (`int`): row of the batch.
            step (`int`): number of tokens that the row has emitted before.

        Raises:
            RuntimeError: when a probability is negative, infinite or NaN, as in `torch.multinomial`.
        """
        if not ((probs.max() < torch.inf) & (probs.min() >= 0)).item():
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        while len(self._noise) <= step - self._first_step:
            noise = torch.empty(self.num_rows, probs.shape[1], dtype=probs.dtype, device=probs.device)
            self._noise.append(noise.exponential_())
        return (probs / self._noise[step - self._first_step][row]).argmax(-1)

    def forget(self, step: int) -> None:
        """Drops the noise of all steps before `step`. Every row must have passed them."""
        del self._noise[: max(0, step - self._first_step)]
        self._first_step = max(self._first_step, step)


__all__ = ["SamplingNoise"]
