"""A timer for the phases of the decoding loop."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch

from ..observer import current_observer, observing


class PhaseTimer:
    """
    Adds up the seconds of each phase inside its block (`with PhaseTimer() as timer:`). There can be one timer at a
    time in a thread.

    Time counts for the innermost phase alone. Phases are told apart by their path from the outermost phase, so that a
    draft forward of the prefill and one of the decoding loop are not mixed.

    Args:
        device (`torch.device`, *optional*): a GPU to wait for at both ends of a phase, because its work may still run
            when the host has gone on. This makes the loop slower than it is without a timer.
    """

    def __init__(self, device: torch.device | None = None):
        self._now = time.perf_counter
        if device is not None and device.type == "cuda":
            self._now = partial(_time_on, device)
        # One mark for each begin of a phase (with its name) and for each end (with `None`): when it was reached, and
        # when the timer had noted it. The time between the two is the timer's own and counts for no phase. The
        # property `seconds` adds the marks up.
        self._marks: list[tuple[float, float, str | None]] = []
        self._seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self._path: list[str] = []
        self._since = 0.0
        self._block = ExitStack()

    @property
    def seconds(self) -> dict[tuple[str, ...], float]:
        """Seconds so far of each phase, by its path from the outermost phase."""
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
        """Forgets the seconds so far, but not which phases are open."""
        self.seconds.clear()
        self._since = self._now()

    def inside(self, outer: str) -> dict[str, float]:
        """Seconds of the phases inside the outermost phase `outer`, by name. Time of `outer` outside all of them
        counts under `outer` itself."""
        result: dict[str, float] = defaultdict(float)
        for path, seconds in self.seconds.items():
            if path[0] == outer:
                result[path[-1]] += seconds
        return dict(result)

    def __enter__(self) -> PhaseTimer:
        if current_observer().phase is not None:
            raise RuntimeError("Another `PhaseTimer` is active.")
        self._block.enter_context(observing(phase=partial(_Section, self)))
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()


def _time_on(device: torch.device) -> float:
    if not torch.cuda.is_current_stream_capturing():  # during a capture, waiting is not allowed and no work runs
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Section(AbstractContextManager[None]):
    # The methods make as few calls as possible, because after forwards of a large model each call costs microseconds,
    # which would count as part of a round.
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


__all__ = ["PhaseTimer"]
