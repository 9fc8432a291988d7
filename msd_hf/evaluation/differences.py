"""Where an output leaves that of the target alone, and how near the decision was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Difference:
    """
    The first token that differs.

    Args:
        position (`int`): its place among the new tokens, from 0.
        gap (`float`): between the two largest logits of the target there.
        gap_in_roundings (`float`): the gap in units of the last place of the largest of the two, in the target's
            dtype. A difference at a gap of many of these does not come from rounding.
    """

    position: int
    gap: float
    gap_in_roundings: float


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Place of the first token that differs, one sequence's end included; `None` if they are the same."""
    for position, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def describe_difference(
    target: PreTrainedModel, inputs: Mapping[str, Any], position: int, **generate_arguments: Any
) -> Difference:
    """
    Runs the target alone up to a token and looks at its two largest logits there.

    Args:
        target (`PreTrainedModel`): the target.
        inputs (`Mapping`): what the processor gave for one prompt.
        position (`int`): of the token.
        generate_arguments: as for the runs that were compared.
    """
    arguments = {**generate_arguments, "max_new_tokens": position + 1}
    output = target.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
    if len(output.logits) <= position:  # the target alone had ended: it chose the end one token before
        position = len(output.logits) - 1
    largest, second = output.logits[position][0].topk(2).values.double().tolist()
    unit = torch.finfo(target.dtype).eps * max(abs(largest), abs(second))
    return Difference(position, largest - second, (largest - second) / unit if unit else float("inf"))


__all__ = ["Difference", "describe_difference", "first_difference"]
