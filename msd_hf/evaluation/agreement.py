"""Agreement of `generate` with a draft and without one. Rounding explains a difference, and nothing else does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel


@dataclass(frozen=True)
class Disagreement:
    """
    Where a greedy generation with a draft first leaves the one without.

    Args:
        position (`int`): of the first different token, counted from 0 behind the prompt.
        gap (`float`): the target's logit of its own token there, less that of the token that came out instead.
        rounding (`float`): the largest error of any of the target's logits there, against exact arithmetic.
    """

    position: int
    gap: float
    rounding: float

    @property
    def is_explained(self) -> bool:
        """Whether rounding alone can turn the two tokens around: one logit is too high by it, the other too low."""
        return self.gap <= 2 * self.rounding


def find_disagreement(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    reference: PreTrainedModel,
    **generate_arguments: Any,
) -> Disagreement | None:
    """
    Generates greedily with and without the draft.

    Args:
        target (`PreTrainedModel`): the target.
        draft (`MSDDraftModel`): the draft.
        inputs (`Mapping`): what the processor gave for one prompt, in the target's dtype.
        reference (`PreTrainedModel`): the target with the same weights in float64, which tells its rounding errors.
        generate_arguments: further arguments of `generate`.

    Returns:
        [`Disagreement`], or `None` if both give the same tokens.
    """
    arguments = {**generate_arguments, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = target.generate(**inputs, **arguments)
    drafted = target.generate(**inputs, **arguments, assistant_model=draft)
    length = plain.sequences.shape[1] - len(plain.logits)  # of the prompt
    expected, got = plain.sequences[0, length:].tolist(), drafted.sequences[0, length:].tolist()
    if got == expected:
        return None
    position = next(place for place, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1])
    logits = plain.logits[position][0].double()
    gap = logits[expected[position]] - logits[got[position]]

    # The reference is led along the target's tokens, so that all inputs of any family are as they were.
    exact_inputs = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    arguments["max_new_tokens"] = position + 1
    exact = reference.generate(
        **exact_inputs, **arguments, prefix_allowed_tokens_fn=lambda _, ids: [expected[len(ids) - length]]
    )
    rounding = (logits - exact.logits[position][0]).abs().max()
    return Disagreement(position, gap.item(), rounding.item())


__all__ = ["Disagreement", "find_disagreement"]
