"""Figures of merit of speculative decoding, as papers define them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def mean_acceptance_length(acceptance_lengths: Iterable[Sequence[int]]) -> float:
    """
    tau: tokens emitted per verification forward of the target, the bonus token included. Its least value is 1; the
    mean number of accepted draft tokens, which some papers print instead, is `tau - 1`.

    Args:
        acceptance_lengths: one list a sequence, as in `MSDGenerateOutput.acceptance_lengths`.

    Returns:
        `float`: the mean over all verifications; `nan` if there was none.
    """
    lengths = [length for sequence in acceptance_lengths for length in sequence]
    return sum(lengths) / len(lengths) if lengths else float("nan")


__all__ = ["mean_acceptance_length"]
