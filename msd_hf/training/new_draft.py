"""The draft that a training begins with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoders import decoder_of
from ..draft.base import DraftPreTrainedModel
from ..errors import MSDError
from .arguments import MSDTrainingArguments


logger = logging.get_logger(__name__)


def new_draft(
    target: PreTrainedModel, args: MSDTrainingArguments, tokens: torch.Tensor | None = None
) -> DraftPreTrainedModel:
    """
    Makes a new draft for a target, as the arguments describe it.

    Args:
        target: the target.
        args: the arguments.
        tokens (`torch.LongTensor` of shape `[V']`, *optional*): the tokens that it proposes, as many as
            `draft_vocab_size` says.

    The draft is float32, because the rounding of a shorter dtype would swallow small steps. A draft that cannot start
    from the target's last layer gets random weights if only the recipe asks for this start. If the user asks for it,
    there is an error.

    Raises:
        MSDError: when the draft cannot be made as the user asked.
    """
    if (tokens is None) != (args.draft_vocab_size is None):
        raise MSDError(
            "`draft_vocab_size` and `tokens` go together: `new_draft` needs the tokens, which `MSDTrainer` counts in "
            "its data."
        )
    model_class = args.kind.model_class
    overrides = args.kind.fields(args, args.layers_of(len(decoder_of(target).layers)))
    start: dict[str, Any] = {"init_from_last_layer": True} if args.init_from_last_layer else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        try:
            draft = model_class.from_target(target, **start, **overrides)
        except MSDError as error:
            if not args.init_from_last_layer or args.start_is_given:
                raise
            logger.warning("The draft starts from random weights: %s", error)
            torch.manual_seed(args.seed)
            draft = model_class.from_target(target, **overrides)
    if tokens is not None:
        draft.set_draft_vocab(tokens)
    if args.init_from_head:
        draft.start_from_head(target)
    return draft.float()


__all__ = ["new_draft"]
