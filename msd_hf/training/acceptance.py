"""The real acceptance length of a draft, measured by `generate` on held-out prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..draft.base import DraftPreTrainedModel
from ..errors import MSDDataError, errors_name_sample
from ..observer import observing
from ..prompts import build_chat_inputs
from ..tree.settings import default_size
from .curriculum import SampleKind
from .data.conversations import Conversation


@torch.no_grad()
def acceptance_lengths(
    target: PreTrainedModel,
    draft: DraftPreTrainedModel,
    processor: Any,
    conversations: Iterable[Conversation],
    max_new_tokens: int = 128,
    show_progress: bool = False,
) -> dict[SampleKind, list[list[int]]]:
    """
    Measures acceptance lengths: the target answers the first question of each conversation greedily with the draft.
    Automatic trees would depend on the machine and its load, so a draft that has them is measured with trees of the
    default size.

    Args:
        target, draft: the pair.
        processor: the target's processor.
        conversations: the conversations. Broken ones are left out.
        max_new_tokens: length limit of an answer.
        show_progress: whether to show a progress bar.

    Returns:
        For text and for visual conversations, one list per answer: the number of tokens that each verification
        emitted. The mean of these numbers is tau, see [`~msd_hf.evaluation.mean_acceptance_length`].
    """
    lengths: dict[SampleKind, list[list[int]]] = {"text": [], "visual": []}
    was_training, own = draft.training, draft.generation_config
    draft.eval()
    draft.generation_config = copy.deepcopy(own)
    draft.generation_config.update(**default_size(own))
    try:
        for conversation in tqdm(conversations, desc="tau", disable=not show_progress, leave=False):
            try:
                messages, images = conversation.first_prompt()
                with errors_name_sample(conversation.id):
                    inputs = build_chat_inputs(processor, messages, images).to(target.device, dtype=target.dtype)
            except MSDDataError:
                continue
            with observing(notices=False):  # at first a draft is of no use
                output = target.generate(
                    **inputs,
                    assistant_model=draft,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    synced_gpus=False,  # ZeRO-3 would turn it on, for targets that it has sharded; this one is whole
                    return_dict_in_generate=True,
                    output_scores=False,
                )
            lengths["visual" if images else "text"] += output.acceptance_lengths
    finally:
        draft.generation_config = own
        draft.train(was_training)
    return lengths


__all__ = ["acceptance_lengths"]
