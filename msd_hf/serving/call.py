"""One request on its way: whether it has been given up, and what its generation has done."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..decoding.run_stats import MSDRunStats
from .refusals import RequestError


class CallCancelled(Exception):
    """Raised in `generate`, by the streamer of a request that was given up."""


@dataclass
class Call:
    """
    One request. The event loop makes it and the thread that generates fills it.

    Args:
        loop: the event loop of the server.
    """

    loop: asyncio.AbstractEventLoop
    wants_draft: bool = True
    seed: int | None = None
    sets_length: bool = False  # whether the request asks for a length
    job: Future[None] | None = None  # done when the generation has ended or was skipped
    error: RequestError | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0  # in `generate`, without the time in the queue
    stats: MSDRunStats | None = None  # of a finished call with the draft
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # a token has come, or the generation has ended
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Gives the request up: its generation ends at its next token, or never begins."""
        self._cancelled.set()

    def go_on(self) -> None:
        """Called by the thread that generates. Raises [`CallCancelled`] when the request was given up."""
        if self._cancelled.is_set():
            raise CallCancelled

    def note_begun(self) -> None:
        """Called by the thread that generates, when a token has come or none will come."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.begun.set)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def figures(self) -> dict[str, Any]:
        """What `usage.msd_hf` of the reply says."""
        figures: dict[str, Any] = {"draft": self.wants_draft, "tokens_per_second": round(self.tokens_per_second, 2)}
        if self.stats is not None:
            has_rounds = self.stats.rounds > 0  # tau of an answer of one token is NaN, which JSON does not know
            figures |= {"rounds": self.stats.rounds, "tau": round(self.stats.tau, 4) if has_rounds else None}
        return figures


current_call: ContextVar[Call] = ContextVar("current_call")

__all__ = ["Call", "CallCancelled", "current_call"]
