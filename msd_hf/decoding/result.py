"""What a call of `generate` with a draft returns, and its mean acceptance length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers.generation import GenerateDecoderOnlyOutput


@dataclass
class MSDGenerateOutput(GenerateDecoderOnlyOutput):
    """
    What `generate(assistant_model=draft, return_dict_in_generate=True)` returns: all that `generate` returns without a
    draft, and

    Args:
        acceptance_lengths (`list[list[int]]`):
            One list a sequence: the tokens emitted by each verification, the bonus token included. Their mean is tau.
    """

    acceptance_lengths: list[list[int]] | None = None


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


__all__ = ["MSDGenerateOutput", "mean_acceptance_length"]
