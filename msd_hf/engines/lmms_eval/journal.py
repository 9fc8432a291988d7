"""Which call of `generate` answered which request of lmms-eval, and how long each request took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import TokenCounts

from .recorded_generate import GenerateCall


@dataclass
class MSDTokenCounts(TokenCounts):
    """
    What lmms-eval writes beside the score of a sample (`token_counts` in the file of samples), with more fields.

    Args:
        seconds (`float`): of the call of `generate`.
        evaluation_seconds (`float`): of the whole request: reading the picture, the processor, `generate`, decoding.
        rounds (`int`, *optional*): verifications by the target; `None` without a draft.
        tau (`float`, *optional*): mean number of tokens that a verification emitted; `None` without a draft.
    """

    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    rounds: int | None = None
    tau: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts for the file of samples. Fields that are `None` are left out."""
        ours = {name: getattr(self, name) for name in ("seconds", "evaluation_seconds", "rounds", "tau")}
        return {**super().to_dict(), **{name: value for name, value in ours.items() if value is not None}}


class Journal:
    """Notes requests and calls in the order in which they come. A model class asks one question at a time: it asks the
    task for a request's pictures or messages, and calls `generate` once."""

    def __init__(self) -> None:
        self._calls: dict[int, GenerateCall] = {}
        self._seconds: dict[int, float] = {}
        self._current: int | None = None
        self._started = 0.0

    def begin(self, number: int) -> None:
        """Notes that the model class turns to a request."""
        self.end()
        self._current, self._started = number, time.perf_counter()

    def note(self, call: GenerateCall) -> None:
        """Notes a call of `generate`: it belongs to the request that was begun last."""
        if self._current is not None:
            self._calls[self._current] = call

    def end(self) -> None:
        """Notes that the last request is answered."""
        if self._current is not None:
            spent = time.perf_counter() - self._started
            self._seconds[self._current] = self._seconds.get(self._current, 0.0) + spent
            self._current = None

    def counts(self, number: int) -> MSDTokenCounts | None:
        """The counts of a request; `None` if its call failed."""
        call = self._calls.get(number)
        if call is None:
            return None
        return MSDTokenCounts(
            input_tokens=call.input_tokens,
            output_tokens=call.output_tokens,
            seconds=call.seconds,
            evaluation_seconds=self._seconds[number],
            rounds=call.rounds,
            tau=call.tau,
        )


__all__ = ["Journal", "MSDTokenCounts"]
