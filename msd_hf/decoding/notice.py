"""One warning a pair when the target takes hardly any token of the draft."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from transformers.utils import logging


logger = logging.get_logger(__name__)

NUM_ROUNDS = 50
# A draft that does not pay is soon paused by automatic trees. So many of the rounds must have been drafted.
LEAST_DRAFTED = 8
# Drafted rounds that emit fewer tokens than this on average are near 1, which is what the target emits alone.
NEAR_ONE = 1.2

_MESSAGE = (
    "This draft is of little use to this target so far: in the last %d rounds, a round that drafted emitted %.2f "
    "tokens on average, and the target alone emits 1. The output is right, but not faster. Likely causes, the "
    "likeliest first: the draft was made for another target, or hardly trained; the prompt is not in the target's "
    "chat template; images do not reach the draft (`inputs_embeds` without `input_ids`), or it was trained without "
    "images; the target was fine-tuned after its draft was trained; sampling at a high temperature. What to do: look "
    "at acceptance by depth with `msd-hf bench --target T --draft D --data prompts.json`, use or train the draft of "
    "this target, or leave `assistant_model` out. TROUBLESHOOTING.md has a table under 'Acceptance near 1'."
)


class AcceptanceNotice:
    """Watches the rounds of one pair, over all calls and threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_rounds, self._drafted = 0, [0, 0]  # number and tokens of rounds that drafted
        self._is_given = False

    def add(self, num_rounds: int, drafted_lengths: Sequence[int]) -> None:
        """
        Adds the rounds of a call, and warns if the draft was of no use in the last 50 rounds. Warns once.

        Args:
            num_rounds (`int`): all rounds. Where automatic trees have paused the draft, they count too.
            drafted_lengths (`Sequence[int]`): tokens that each round emitted which drafted.
        """
        if self._is_given:
            return
        with self._lock:
            self._num_rounds += num_rounds
            self._drafted = [self._drafted[0] + len(drafted_lengths), self._drafted[1] + sum(drafted_lengths)]
            (num_rounds, (num_drafted, num_tokens)) = self._num_rounds, self._drafted
            if num_rounds < NUM_ROUNDS or num_drafted < LEAST_DRAFTED:
                return
            self._num_rounds, self._drafted = 0, [0, 0]
            if self._is_given or num_tokens >= NEAR_ONE * num_drafted:
                return
            self._is_given = True
        logger.warning(_MESSAGE, num_rounds, num_tokens / num_drafted)


__all__ = ["AcceptanceNotice"]
