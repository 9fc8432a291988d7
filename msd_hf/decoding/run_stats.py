"""What a call with a draft has done: tokens, rounds, tau and the share of time in drafting. Logged, and kept for
`last_run`."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..draft.target_sizes import generating_model
from .result import mean_acceptance_length


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MSDRunStats:
    """
    What one call of `generate` with a draft has done.

    Args:
        tokens (`int`): new tokens of all rows, padding left out.
        rounds (`int`): verifications by the target.
        drafted_rounds (`int`): the rounds that verified more than the last token; fewer than `rounds` where
            `num_assistant_tokens="auto"` paused the draft, or where the length limit left no room.
        tau (`float`): mean number of tokens that a verification emitted, over all rows; `nan` without a round.
        drafting_share (`float`, *optional*): share of the time of all rounds, prefill left out, that drafting took;
            `None` where the host cannot tell without waiting for a GPU (trees of a set size on a GPU).
    """

    tokens: int
    rounds: int
    drafted_rounds: int
    tau: float
    drafting_share: float | None

    def __str__(self) -> str:
        share = "" if self.drafting_share is None else f", {self.drafting_share:.0%} of the time in drafting"
        rounds = f"{self.rounds:,} rounds ({self.drafted_rounds:,} drafted)"
        return f"{self.tokens:,} tokens in {rounds}, tau {self.tau:.2f}{share}"


@dataclass
class RunTally:
    """
    Counts the rounds of one call. Times are those of the host, which waits for no device on their account.

    Args:
        is_timed (`bool`): whether drafting has ended when the host goes on, so that its time is that of the work.
    """

    is_timed: bool
    drafted: list[bool] = field(default_factory=list)  # for each round, whether it drafted
    seconds: float = 0.0
    drafting_seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Notes that the rounds begin."""
        self._started = time.perf_counter()

    def end(self) -> None:
        """Notes that the rounds have ended."""
        self.seconds = time.perf_counter() - self._started

    def add_drafting(self, started: float) -> None:
        """Adds the time since `started` (`time.perf_counter()`)."""
        self.drafting_seconds += time.perf_counter() - started

    def stats(self, num_tokens: int, acceptance_lengths: Iterable[Sequence[int]]) -> MSDRunStats:
        """The figures of the call."""
        share = self.drafting_seconds / self.seconds if self.is_timed and self.drafted and self.seconds > 0 else None
        tau = mean_acceptance_length(acceptance_lengths)
        return MSDRunStats(num_tokens, len(self.drafted), sum(self.drafted), tau, share)

    def drafted_lengths(self, acceptance_lengths: Iterable[Sequence[int]]) -> list[int]:
        """The tokens that each round emitted for each row, without rounds that did not draft and without the last of
        each row, whose length is that of the answer and says nothing about the draft."""
        return [
            length
            for lengths in acceptance_lengths
            for length, is_drafted in zip(lengths[:-1], self.drafted, strict=False)
            if is_drafted
        ]


_Runs = weakref.WeakKeyDictionary[Any, MSDRunStats]  # target -> its last call


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.runs: _Runs = weakref.WeakKeyDictionary()


_lock = threading.Lock()
_of_thread = _OfThread()
_of_any_thread: _Runs = weakref.WeakKeyDictionary()


def note_run(target: Any, stats: MSDRunStats) -> None:
    """Keeps the figures of a call for [`last_run`], and logs them."""
    _of_thread.runs[target] = stats
    with _lock:
        _of_any_thread[target] = stats
    logger.info("Generated %s.", stats)


def last_run(target: Any) -> MSDRunStats | None:
    """
    What the last finished call of `generate` with a draft has done on a target. Calls without a draft do not count.

    Args:
        target (`PreTrainedModel`): the target, or a wrapper around it (peft, `torch.compile`).

    Returns:
        [`MSDRunStats`] of the last call of this thread; of the last call of any thread if this one has made none, as
        when `generate` runs in a thread of its own and this one reads its streamer; `None` if there was no call.
    """
    model = getattr(target, "_orig_mod", target)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model = generating_model(model)
    stats = _of_thread.runs.get(model)
    if stats is not None:
        return stats
    with _lock:
        return _of_any_thread.get(model)


__all__ = ["MSDRunStats", "RunTally", "last_run", "note_run"]
