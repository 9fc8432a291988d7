"""Named phases of the decoding loop, and a timer for them that costs nothing while nobody measures."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch


_active: PhaseTimer | None = None
_NOT_TIMED: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Marks the block under it as a phase. Does nothing unless a [`PhaseTimer`] is active."""
    return _NOT_TIMED if _active is None else _Section(_active, name)


class PhaseTimer:
    """
    Accumulates the seconds of each phase while it is active (`with PhaseTimer() as timer:`). One at a time, in one
    thread.

    Time counts for the innermost phase alone. Phases are kept by their path from the outermost one, so that a draft
    forward of the prefill and one of the decoding loop are not mixed.

    Args:
        device (`torch.device`, *optional*): is waited for at both ends of a phase if it is a GPU, since work on it
            runs behind the host. That makes the whole slower than it is without a timer.
    """

    def __init__(self, device: torch.device | None = None):
        self._now = time.perf_counter
        if device is not None and device.type == "cuda":
            self._now = partial(_time_on, device)
        # Ends of phases (their names where they begin), added up later. When each was reached, and when it was noted:
        # what lies between is the timer's own, and is nobody's time.
        self._marks: list[tuple[float, float, str | None]] = []
        self._seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self._path: list[str] = []
        self._since = 0.0

    @property
    def seconds(self) -> dict[tuple[str, ...], float]:
        """Seconds so far of each phase, by its path."""
        marks, self._marks = self._marks, []
        for reached, noted, name in marks:
            if self._path:
                self._seconds[tuple(self._path)] += reached - self._since
            self._since = noted
            if name is None:
                self._path.pop()
            else:
                self._path.append(name)
        return self._seconds

    def clear(self) -> None:
        """Forgets what was counted so far, but not in which phases we are."""
        self.seconds.clear()
        self._since = self._now()

    def inside(self, outer: str) -> dict[str, float]:
        """Seconds of the phases inside the outermost phase `outer`, by name; what none of them took is under `outer`
        itself."""
        result: dict[str, float] = defaultdict(float)
        for path, seconds in self.seconds.items():
            if path[0] == outer:
                result[path[-1]] += seconds
        return dict(result)

    def __enter__(self) -> PhaseTimer:
        global _active
        if _active is not None:
            raise RuntimeError("Another `PhaseTimer` is active.")
        _active = self
        return self

    def __exit__(self, *error: object) -> None:
        global _active
        _active = None


def _time_on(device: torch.device) -> float:
    if not torch.cuda.is_current_stream_capturing():  # nothing is done then, and waiting is not allowed
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Section(AbstractContextManager[None]):
    # No more calls than it takes: behind forwards of a large model each costs microseconds, which would count as part
    # of a round.
    def __init__(self, timer: PhaseTimer, name: str):
        self.reached = timer._now()
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        timer = self.timer
        timer._marks.append((self.reached, timer._now(), self.name))

    def __exit__(self, *error: object) -> None:
        timer = self.timer
        reached = timer._now()
        timer._marks.append((reached, timer._now(), None))


__all__ = ["PhaseTimer", "phase"]
