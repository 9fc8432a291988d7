"""The draft that a training begins with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoders import decoder_of
from ..draft.modeling_msd import MSDDraftModel
from ..errors import MSDError
from .arguments import MSDTrainingArguments


logger = logging.get_logger(__name__)


def new_draft(target: PreTrainedModel, args: MSDTrainingArguments) -> MSDDraftModel:
    """
    Makes a new draft for a target, as the arguments describe it.

    The draft is float32, because the rounding of a shorter dtype would swallow small steps. A draft that cannot start
    from the target's last layer gets random weights if only the recipe asks for this start. If the user asks for it,
    there is an error.

    Raises:
        MSDError: when the draft cannot be made as the user asked.
    """
    overrides: dict[str, Any] = {
        "num_hidden_layers": args.make_recipe().draft_layers,
        "decouple_visual_tokens": args.decouple_visual_tokens,
        "global_image_vector": args.make_recipe().global_image_vector,
        "target_layers": args.layers_of(len(decoder_of(target).layers)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        try:
            draft = MSDDraftModel.from_target(target, bool(args.init_from_last_layer), **overrides)
        except MSDError as error:
            if not args.init_from_last_layer or args.start_is_given:
                raise
            logger.warning("The draft starts from random weights: %s", error)
            torch.manual_seed(args.seed)
            draft = MSDDraftModel.from_target(target, **overrides)
    return draft.float()


__all__ = ["new_draft"]
