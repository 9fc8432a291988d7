"""Presets of the questions: `--model_args preset=paper` asks as the evaluation of the paper did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import MSDError, shown


@dataclass(frozen=True)
class Preset:
    """
    How questions are asked.

    Args:
        request (`str`): what is appended to each question, in the place of the task's own `post_prompt`.
        max_new_tokens (`int`): length limit of an answer.
        num_samples (`int`): how many samples of a task are asked, from the first on.
    """

    request: str
    max_new_tokens: int
    num_samples: int

    def question(self, text: str, post_prompt: str) -> str:
        """
        A question with the request.

        Args:
            text: the question as the task words it.
            post_prompt: the task's own instruction at the end of `text`, such as "Answer with a single word.", which
                would contradict the request. It may be empty.
        """
        ending = post_prompt.strip()
        text = text.rstrip()
        return (text.removesuffix(ending).rstrip() if ending else text) + self.request

    def messages(self, messages: Sequence[dict[str, Any]], post_prompt: str) -> list[dict[str, Any]]:
        """The messages of a question with the request in the last text of the user, and without a system prompt."""
        kept = [
            {**message, "content": list(message["content"])} for message in messages if message["role"] != "system"
        ]
        for message in reversed(kept):
            parts = message["content"]
            for index in reversed(range(len(parts))):
                if message["role"] == "user" and parts[index]["type"] == "text":
                    parts[index] = {**parts[index], "text": self.question(parts[index]["text"], post_prompt)}
                    return kept
        return kept

    def check_samples(self, last_sample: int) -> None:
        """
        Refuses samples that the preset leaves out. A model of lmms-eval cannot leave them out itself: each sample is
        scored.

        Args:
            last_sample: the highest number of a sample, counted from 0.

        Raises:
            MSDError: says which option of lmms-eval to add.
        """
        if last_sample >= self.num_samples:
            raise MSDError(
                f"The preset takes the first {self.num_samples} samples of each task, and sample {last_sample} "
                f"(counted from 0) is among the given ones: add --limit {self.num_samples}."
            )


PRESETS = {
    "paper": Preset(
        request="\nFor the following question, provide a detailed explanation of your reasoning leading to the "
        "answer.",
        max_new_tokens=512,
        num_samples=100,
    )
}


def find_preset(name: str | None) -> Preset | None:
    """
    The preset with a name; `None` if no name is given.

    Raises:
        MSDError: when there is no such preset.
    """
    if name is None:
        return None
    if name not in PRESETS:
        raise MSDError(f"`preset` {shown(name)} is not known: use {', '.join(PRESETS)}, or leave it out.")
    return PRESETS[name]


__all__ = ["PRESETS", "Preset", "find_preset"]
