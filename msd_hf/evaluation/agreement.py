"""Agreement of `generate` with and without a draft. Only rounding may explain a difference."""

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
    The first token at which a greedy generation with a draft differs from the one without.

    Args:
        position: index of the first different token among the new tokens.
        gap: the target's logit of its own token at this position, minus its logit of the token that the draft run
            emitted.
        rounding: the largest rounding error of the target's logits at this position, against float64.
    """

    position: int
    gap: float
    rounding: float

    @property
    def is_explained(self) -> bool:
        """Whether rounding alone can exchange the two tokens: it can raise one logit and lower the other."""
        return self.gap <= 2 * self.rounding


def find_disagreement(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    reference: PreTrainedModel,
    **generate_arguments: Any,
) -> Disagreement | None:
    """
    Generates greedily with and without the draft and compares the tokens.

    Args:
        target, draft: the pair.
        inputs: the processor's output for one prompt, in the target's dtype.
        reference: the target with the same weights in float64, to measure rounding errors.
        generate_arguments: further arguments of `generate`.

    Returns:
        The first difference, or `None` if both generations have the same tokens.
    """
    arguments = {**generate_arguments, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = target.generate(**inputs, **arguments)
    drafted = target.generate(**inputs, **arguments, assistant_model=draft)
    length = plain.sequences.shape[1] - len(plain.logits)  # length of the prompt
    expected, got = plain.sequences[0, length:].tolist(), drafted.sequences[0, length:].tolist()
    if got == expected:
        return None
    position = next(place for place, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1])
    logits = plain.logits[position][0].double()
    gap = logits[expected[position]] - logits[got[position]]

    # The reference is made to generate the target's tokens, so that `generate` prepares the inputs for any family of
    # models.
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
