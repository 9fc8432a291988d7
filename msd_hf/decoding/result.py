"""The output of `generate` with a draft, and its mean acceptance length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers.generation import GenerateDecoderOnlyOutput


@dataclass
class MSDGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Output of `generate(assistant_model=draft, return_dict_in_generate=True)`. It has one field and one property more
    than the output of `generate` without a draft.

    Args:
        acceptance_lengths (`list[list[int]]`):
            For each sequence, the number of tokens that each verification emitted, the bonus token included.
    """

    acceptance_lengths: list[list[int]] | None = None

    @property
    def tau(self) -> float:
        """The mean of all `acceptance_lengths`, see [`mean_acceptance_length`]."""
        return mean_acceptance_length(self.acceptance_lengths or [])


def mean_acceptance_length(acceptance_lengths: Iterable[Sequence[int]]) -> float:
    """
    tau: the mean number of tokens emitted per verification forward of the target, the bonus token included. tau is at
    least 1. Some papers print the mean number of accepted draft tokens instead, which is `tau - 1`.

    Args:
        acceptance_lengths: one list per sequence, as in `MSDGenerateOutput.acceptance_lengths`.

    Returns:
        `float`: the mean over all verifications; `nan` if there was none.
    """
    lengths = [length for sequence in acceptance_lengths for length in sequence]
    return sum(lengths) / len(lengths) if lengths else float("nan")


__all__ = ["MSDGenerateOutput", "mean_acceptance_length"]
