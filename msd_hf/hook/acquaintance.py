"""Warns once of a target that is not the one that the draft was made for."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoding.pair import state_of
from ..hub.fingerprint import why_another_target


logger = logging.get_logger(__name__)

_ADVICE = (
    "The output is the target's all the same, but fewer candidates may be accepted: `acceptance_lengths` of the "
    "output with `return_dict_in_generate=True` shows it, or `msd-hf bench`. `msd-hf drafts` lists drafts of a target."
)


def compare_once(target: PreTrainedModel, draft: Any) -> None:
    """
    Compares a target with the one that the draft was made for, at the first call of the pair, and warns if its head
    has other weights.

    Args:
        target (`PreTrainedModel`): the target.
        draft (`Draft`): a draft that has the right sizes for it.
    """
    pair = state_of(target, draft)
    if pair.is_compared:
        return
    pair.is_compared = True
    difference = why_another_target(draft.config, target)
    if difference is not None:
        logger.warning("%s %s", difference, _ADVICE)


__all__ = ["compare_once"]
