"""The prompts of a benchmark, and how they are taken from conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature

from ..errors import MSDError, errors_name_sample
from ..prompts import build_chat_inputs


if TYPE_CHECKING:
    from ..training.data.conversations import Conversations


@dataclass(frozen=True)
class BenchPrompt:
    """
    One prompt of a benchmark.

    Args:
        name: name in reports.
        group: "text" or "visual". Reports also give the figures of each group.
        make_inputs: makes the target's inputs, `[1, L]`.
    """

    name: str
    group: str
    make_inputs: Callable[[], BatchFeature]


def first_questions(conversations: Conversations, processor: Any, num_prompts: int) -> list[BenchPrompt]:
    """
    Makes prompts of the first question, with its images, of each of the first `num_prompts` conversations.

    Raises:
        MSDError: when there is no conversation.
        MSDDataError: when a conversation is broken. All prompts are made here once, so that this shows before the long
            work.
    """
    prompts = []
    for index in range(min(num_prompts, len(conversations))):
        conversation = conversations[index]
        messages, images = conversation.first_prompt()
        make_inputs = partial(build_chat_inputs, processor, messages, images)
        with errors_name_sample(conversation.id):
            make_inputs()  # shows an error now, before the long work
        prompts.append(BenchPrompt(conversation.id, "visual" if images else "text", make_inputs))
    if not prompts:
        raise MSDError("There are no conversations to take prompts from.")
    return prompts


__all__ = ["BenchPrompt", "first_questions"]
