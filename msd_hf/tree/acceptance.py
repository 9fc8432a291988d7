"""How often drafted nodes were accepted, by the draft's own probability. Does not depend on the machine."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .running_mean import RunningMean
from .state import number


# Nodes are counted in bins of log-probability; an octave is a factor of 2 in probability.
_BINS_PER_OCTAVE, _NUM_BINS = 2, 40
_BINS_PER_UNIT = _BINS_PER_OCTAVE / math.log(2)
_LEAST_LOG_PROB = -1e3
_PRIOR_WEIGHT = 8.0  # weight of the draft's own probability, in observed nodes
_MOST_LOADED_STEPS = 16.0  # weight of a mean that comes from a file, in measurements


class Acceptance:
    """Counts accepted nodes. The experiences of one pair with batches of different sizes share it, and its lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # Nodes in each bin. The best node of each level is counted apart from the others.
        self.accepted = {is_best: [0.0] * _NUM_BINS for is_best in (False, True)}
        self.seen = {is_best: [0.0] * _NUM_BINS for is_best in (False, True)}
        self.steps = RunningMean()  # measurements of `step`

    def chances(self, log_probs: Sequence[float], best: Collection[float]) -> list[float]:
        """
        The probabilities that nodes are accepted.

        Args:
            log_probs (`Sequence[float]`): the cumulative log-probability of each node.
            best (`Collection[float]`): those of the best nodes of all levels.
        """
        chances = []
        for log_prob in log_probs:  # in one call for all nodes, because a call takes as long as the rest of it
            if not log_prob > _LEAST_LOG_PROB:  # true for NaN too
                chances.append(0.0)
                continue
            is_best, index = log_prob in best, _bin_index(log_prob)
            prior = _PRIOR_WEIGHT * math.exp(log_prob)
            chances.append((self.accepted[is_best][index] + prior) / (self.seen[is_best][index] + _PRIOR_WEIGHT))
        return chances

    @property
    def step(self) -> float:
        """The probability that an accepted path which reaches a level also reaches the next one."""
        return 1.0 if self.steps.value is None else self.steps.value

    def add_step(self, share: float) -> None:
        """Records the probability of reaching a level, divided by that of reaching the level above it."""
        self.steps.add(share)

    def add_node(self, log_prob: float, is_best: bool, is_accepted: bool) -> None:
        """Records whether a node was accepted."""
        if not log_prob > _LEAST_LOG_PROB:
            return
        index = _bin_index(log_prob)
        self.accepted[is_best][index] = 0.99 * self.accepted[is_best][index] + is_accepted
        self.seen[is_best][index] = 0.99 * self.seen[is_best][index] + 1.0

    def state(self) -> dict[str, Any]:
        """What was counted, for a file."""
        bins = {name: [values[False], values[True]] for name, values in self._bins().items()}
        return {**bins, "steps": self.steps.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """
        Takes over a `state()`. A new answer soon counts as much.

        Raises:
            ValueError, TypeError, KeyError: when the state is damaged.
        """
        for name, values in self._bins().items():
            for is_best, saved in zip((False, True), state[name], strict=True):
                if len(saved) != _NUM_BINS:
                    raise ValueError(f"`{name}` holds {len(saved)} numbers where {_NUM_BINS} are expected.")
                values[is_best] = [number(value) for value in saved]
        self.steps = RunningMean.of_state(state["steps"], _MOST_LOADED_STEPS)

    def _bins(self) -> dict[str, dict[bool, list[float]]]:
        return {"accepted": self.accepted, "seen": self.seen}


def _bin_index(log_prob: float) -> int:
    return min(_NUM_BINS - 1, int(-log_prob * _BINS_PER_UNIT))


__all__ = ["Acceptance"]
