"""Finds the first token at which two outputs differ, and measures how close the target's choice was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Difference:
    """
    The first token at which an output differs from that of the target alone, and how close the target's choice was.

    Args:
        position: index of the token among the new tokens.
        gap: difference of the target's two largest logits at this position.
        gap_in_roundings: the gap in units of the last place of the larger logit, in the target's dtype. Rounding does
            not explain a difference where the gap is many such units.
    """

    position: int
    gap: float
    gap_in_roundings: float


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first token that differs, or of the end of the shorter sequence; `None` if both are equal."""
    for position, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def describe_difference(
    target: PreTrainedModel, inputs: Mapping[str, Any], position: int, **generate_arguments: Any
) -> Difference:
    """
    Runs the target alone up to a token and measures the gap of its two largest logits there.

    Args:
        target: the target.
        inputs: the processor's output for one prompt.
        position: index of the token among the new tokens.
        generate_arguments: the arguments of the runs that were compared.
    """
    arguments = {**generate_arguments, "max_new_tokens": position + 1}
    output = target.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
    if len(output.logits) <= position:  # the target alone ended before this token
        position = len(output.logits) - 1
    largest, second = output.logits[position][0].topk(2).values.double().tolist()
    unit = torch.finfo(target.dtype).eps * max(abs(largest), abs(second))
    return Difference(position, largest - second, (largest - second) / unit if unit else float("inf"))


__all__ = ["Difference", "describe_difference", "first_difference"]
