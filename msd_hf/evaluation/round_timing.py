"""Where the time of a decoding round goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


# The name of a phase in `PhaseTimer` -> the name of this part of a round in reports.
PARTS = {
    "target forward": "target forward",
    "draft forward": "draft layers",
    "draft head": "draft head",
    "tree": "tree building",
    "verification": "verification",
    "cache": "cache",
    "decode": "the rest",
}
# Phases inside the modules of the two models. The draft uses the target's head.
_MODEL_PHASES = ("target forward", "draft forward", "draft head")


@dataclass(frozen=True)
class RoundTiming:
    """
    The time of a decoding loop, by part of a round.

    Args:
        num_rounds (`int`): number of rounds of drafting, verification and acceptance.
        seconds (`Mapping[str, float]`): seconds of all rounds together, by part of a round.
    """

    num_rounds: int
    seconds: Mapping[str, float]

    @classmethod
    def from_phases(cls, phases: Mapping[str, float], num_rounds: int) -> RoundTiming:
        """Makes a timing from the seconds of each phase, the result of `PhaseTimer.inside("decode")`."""
        return cls(num_rounds, {part: phases.get(name, 0.0) for name, part in PARTS.items()})

    @classmethod
    def total(cls, timings: Iterable[RoundTiming]) -> RoundTiming:
        """Adds up the timings of several loops."""
        timings = list(timings)
        seconds = {part: sum(timing.seconds[part] for timing in timings) for part in PARTS.values()}
        return cls(sum(timing.num_rounds for timing in timings), seconds)

    @property
    def loop_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def efficiency(self) -> float:
        """Share of the loop that is spent inside the modules of target and draft; `nan` without a loop."""
        inside = sum(self.seconds[PARTS[name]] for name in _MODEL_PHASES)
        return inside / self.loop_seconds if self.loop_seconds else float("nan")

    @property
    def milliseconds_per_round(self) -> dict[str, float]:
        """Mean milliseconds of a round, by part of a round; empty without rounds."""
        if not self.num_rounds:
            return {}
        return {part: 1e3 * seconds / self.num_rounds for part, seconds in self.seconds.items()}


__all__ = ["PARTS", "RoundTiming"]
