"""The prompts of a benchmark, and how they are taken from conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature

from ..errors import MSDError, errors_name_sample
from ..prompts import build_chat_inputs


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..training.data.conversations import Conversations


@dataclass(frozen=True)
class BenchPrompt:
    """
    One prompt of a benchmark.

    Args:
        name: name in reports.
        group: "text" or "visual". Reports also give the figures of each group.
        make_inputs: makes the target's inputs, `[1, L]`.
        question: what the user says, for reports.
        images: the pictures of the prompt, for reports.
    """

    name: str
    group: str
    make_inputs: Callable[[], BatchFeature]
    question: str = ""
    images: Sequence[Image] = ()


def first_questions(conversations: Conversations, processor: Any, num_prompts: int) -> list[BenchPrompt]:
    """
    Makes prompts of the first question, with its images, of each of the first `num_prompts` conversations. A prompt
    is named by the id of its conversation; several of one id get numbers too.

    Raises:
        MSDError: when there is no conversation.
        MSDDataError: when a conversation is broken. All prompts are made here once, so that this shows before the long
            work.
    """
    prompts = []
    seen: Counter[str] = Counter()
    for index in range(min(num_prompts, len(conversations))):
        conversation = conversations[index]
        messages, images = conversation.first_prompt()
        make_inputs = partial(build_chat_inputs, processor, messages, images)
        with errors_name_sample(conversation.id):
            make_inputs()  # shows an error now, before the long work
        seen[conversation.id] += 1
        number = seen[conversation.id]
        name = conversation.id if number == 1 else f"{conversation.id} ({number})"
        prompts.append(BenchPrompt(name, "visual" if images else "text", make_inputs, _said(messages), images))
    if not prompts:
        raise MSDError("There are no conversations to take prompts from.")
    return prompts


def _said(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user says in chat messages."""
    parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
    return "\n".join(part["text"].strip() for part in parts if part["type"] == "text")


__all__ = ["BenchPrompt", "first_questions"]
