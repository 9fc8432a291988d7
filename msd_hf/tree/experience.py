"""Measured costs of drafting and verification, and measured acceptance, for one pair on one machine."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Collection, Sequence


# Sizes of trees, in nodes, that are drafted to measure their costs.
SIZES = (1, 4, 8, 16, 32, 64, 128)
# Each size is measured twice, because the first measurement includes warming up, in at most one round of three.
_TRIALS_PER_SIZE, _ROUNDS_PER_TRIAL = 2, 3
# Larger trees are not measured before rounds with drafting emit more than one token on average.
_LARGEST_UNPROVEN_SIZE = 16
# Assumed cost of one more node, as a share of the mean cost; and the weight of this assumption, in squared nodes.
_PRIOR_SLOPE, _SLOPE_WEIGHT = 0.01, 64.0
_NUM_COSTS_KEPT = 15  # latest costs of each width of a level
# Costs are kept by range of context lengths. The first range ends at this many slots, the next ones at twice, four
# times, ... as many.
_FIRST_RANGE = 512

# Nodes are counted in bins of log-probability; an octave is a factor of 2 in probability.
_BINS_PER_OCTAVE, _NUM_BINS = 2, 40
_BINS_PER_UNIT = _BINS_PER_OCTAVE / math.log(2)
_LEAST_LOG_PROB = -1e3
_PRIOR_WEIGHT = 8.0  # weight of the draft's own probability, in observed nodes
_FORGETTING = 0.97  # factor on the weight of old rounds at each new round
# When drafting does not pay, it pauses for this number of rounds. The pause grows by a factor each time that drafting
# still does not pay after it, and by a larger one if nothing at all was accepted.
_PAUSE, _LONGEST_PAUSE = 16, 512
_GROWTH, _GROWTH_IF_USELESS = 2, 4
# Rounds with drafting before it is judged: at first, after a pause, and after a pause because nothing was accepted.
# One round is enough then: if it accepts nothing again, little is lost by another pause.
_ROUNDS_TO_JUDGE, _ROUNDS_TO_JUDGE_AGAIN, _ROUNDS_TO_JUDGE_IF_USELESS = 4, 2, 1
# Weight of the mean over all calls in the rate of one call, in rounds.
_PRIOR_ROUNDS = 4.0


def level_widths(widest: int) -> list[int]:
    """The widths that a level of drafting may have: the powers of two below `widest`, and `widest`."""
    return [1 << power for power in range((widest - 1).bit_length())] + [widest]


class _Mean:
    """A mean in which old values lose weight."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        self.total = self.total * _FORGETTING + value
        self.weight = self.weight * _FORGETTING + 1.0

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class _Line:
    """Cost as a linear function of the number of nodes, fitted to rounds. Old rounds lose weight, so when the machine
    becomes slower or faster, the costs of all sizes follow."""

    def __init__(self) -> None:
        self._reset()

    def add(self, num_nodes: int, seconds: float) -> None:
        if self.nodes.weight:
            known = self.at(num_nodes)
            if seconds < known / 4:
                self._reset()  # earlier rounds included warming up
            seconds = min(seconds, 1.5 * known)  # now and then another process takes the processor
        for mean, value in (
            (self.nodes, num_nodes),
            (self.seconds, seconds),
            (self.squares, num_nodes * num_nodes),
            (self.products, num_nodes * seconds),
        ):
            mean.add(value)

    def _reset(self) -> None:
        self.nodes, self.seconds, self.squares, self.products = _Mean(), _Mean(), _Mean(), _Mean()

    @property
    def slope(self) -> float:
        """Cost of one more node, in seconds."""
        mean_nodes, mean_seconds = self._means
        covariance = self.products.total - self.nodes.total * mean_seconds
        variance = self.squares.total - self.nodes.total * mean_nodes
        slope = (covariance + _SLOPE_WEIGHT * _PRIOR_SLOPE * mean_seconds) / (variance + _SLOPE_WEIGHT)
        return min(max(slope, 0.0), mean_seconds / mean_nodes)  # at most as steep as a line through the origin

    def at(self, num_nodes: int) -> float:
        """Cost of `num_nodes` nodes, in seconds."""
        mean_nodes, mean_seconds = self._means
        return mean_seconds + self.slope * (num_nodes - mean_nodes)

    def up_to(self, num_nodes: int) -> list[float]:
        """Costs of 1, 2, ..., `num_nodes` nodes, in seconds."""
        first, slope = self.at(1), self.slope
        return [first + slope * num_more for num_more in range(num_nodes)]

    @property
    def _means(self) -> tuple[float, float]:
        return self.nodes.total / self.nodes.weight, self.seconds.total / self.seconds.weight


class Experience:
    """
    Measured costs of drafting and verification, in seconds, and the measured acceptance of nodes. Calls in several
    threads may share it: each takes the `lock` for a few methods, `enter_context` first.

    Args:
        max_nodes (`int`): number of nodes of the largest tree.
    """

    def __init__(self, max_nodes: int):
        self.lock = threading.RLock()
        self.sizes = [size for size in SIZES if size < max_nodes] + [max_nodes]
        # By range of context lengths. The costs exclude drafting.
        self._costs: dict[int, _Line] = {}  # rounds with several nodes
        self._plain_costs: dict[int, _Mean] = {}  # rounds with one node
        self._num_trials: dict[int, dict[int, int]] = {}  # size of a tree -> number of measurements
        self._num_slots, self._range = 0, 0  # the current context length, and its range
        self._num_rounds = 0
        # By width of a level.
        self._level_costs: dict[int, deque[float]] = {}
        self._num_level_trials: dict[int, int] = {}
        # Whole rounds, with and without drafting.
        self._drafted_tokens, self._drafted_seconds = _Mean(), _Mean()
        self._plain_seconds = _Mean()
        # Nodes in each bin. The best node of each level is counted apart from the others.
        self._accepted = {is_best: [0.0] * _NUM_BINS for is_best in (False, True)}
        self._seen = {is_best: [0.0] * _NUM_BINS for is_best in (False, True)}
        self._steps = _Mean()  # measurements of `step`
        self._pause = _PAUSE
        self._pause_left = 0
        self._rounds_to_judge = _ROUNDS_TO_JUDGE

    # ---- estimates ----

    def enter_context(self, num_slots: int) -> None:
        """Selects the statistics for this context length."""
        if num_slots == self._num_slots:
            return
        self._num_slots = num_slots
        self._range = max(0, math.ceil(math.log2(max(num_slots, 1) / _FIRST_RANGE)))

    def next_to_explore(self) -> int | None:
        """The number of nodes whose cost this round should measure; `None`: no measurement, take the size that pays.
        Called once per round."""
        if self._range not in self._num_trials:
            # 16, then the sizes furthest from it: a few costs are enough to interpolate the others.
            order = sorted(self.sizes, key=lambda size: -abs(math.log2(size / 16)))
            self._num_trials[self._range] = dict.fromkeys(([16] if 16 in order else []) + order, 0)
        self._num_rounds += 1
        num_trials = self._num_trials[self._range]
        is_proven = (self._drafted_tokens.value or 1.0) > 1.0
        if not is_proven and self._rounds_to_judge == 0:
            return None  # nothing was accepted, so no size pays, whatever it costs
        size = min(
            (size for size in num_trials if is_proven or size <= _LARGEST_UNPROVEN_SIZE), key=num_trials.__getitem__
        )
        if num_trials[size] >= _TRIALS_PER_SIZE or self._num_rounds % _ROUNDS_PER_TRIAL != 1:
            return None
        num_trials[size] += 1  # counted here, because a tree near the length limit is smaller than asked for
        return size

    def seconds_up_to(self, num_nodes: int) -> list[float]:
        """Costs of rounds with 1, 2, ..., `num_nodes` nodes, without drafting. Before the first measurement only
        their ratios are meaningful."""
        line, plain = self._costs.get(self._range), self._plain_costs.get(self._range)
        costs = (
            [1.0 + _PRIOR_SLOPE * nodes for nodes in range(1, num_nodes + 1)]
            if line is None
            else line.up_to(num_nodes)
        )
        if plain is not None and plain.value is not None:
            if line is None:
                costs = [plain.value * cost for cost in costs]
            costs[0] = min(plain.value, costs[0])
        return costs

    def acceptances(self, log_probs: Sequence[float], best: Collection[float]) -> list[float]:
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
            chances.append((self._accepted[is_best][index] + prior) / (self._seen[is_best][index] + _PRIOR_WEIGHT))
        return chances

    @property
    def step(self) -> float:
        """The probability that an accepted path which reaches a level also reaches the next one."""
        return 1.0 if self._steps.value is None else self._steps.value

    def width_to_explore(self, widest: int) -> int:
        """Chooses the width up to `widest` whose cost was measured least often, and counts one more measurement."""
        width = min(level_widths(widest), key=lambda width: self._num_level_trials.get(width, 0))
        self._num_level_trials[width] = self._num_level_trials.get(width, 0) + 1
        return width

    @property
    def tokens_per_second(self) -> float | None:
        """The mean rate of rounds with drafting; `None` before the first such round."""
        return self.rate_with(0.0, 0.0)

    def rate_with(self, tokens: float, seconds: float) -> float | None:
        """Tokens per second of a call that has emitted `tokens` in `seconds`, blended with the mean over all calls: a
        short call is assumed to be like others."""
        mean_tokens, mean_seconds = self._drafted_tokens.value, self._drafted_seconds.value
        if mean_tokens is None or mean_seconds is None:
            return None
        return (_PRIOR_ROUNDS * mean_tokens + tokens) / (_PRIOR_ROUNDS * mean_seconds + seconds)

    def seconds_of_levels(self, widths: Sequence[int]) -> list[float] | None:
        """Costs of drafting one more level of each width and verifying its nodes; `None` before a level was
        measured."""
        if not self._level_costs:
            return None
        typical = {width: _lower_quartile(costs) for width, costs in self._level_costs.items()}
        line = self._costs.get(self._range)
        slope = 0.0 if line is None else line.slope
        # A level costs no more than a wider one. If it was measured higher, the measurement included warming up.
        widest = typical[max(typical)]
        return [
            min((seconds for measured, seconds in typical.items() if measured >= width), default=widest)
            + width * slope
            for width in widths
        ]

    @property
    def is_paused(self) -> bool:
        """Whether the next round does not draft, unless it is to measure a size."""
        return self._pause_left > 0

    @property
    def _is_useless(self) -> bool:
        """Whether drafting was tried and nothing was accepted."""
        return self._drafted_tokens.value == 1.0

    def drafting_pays(self) -> bool:
        """Whether this round should draft. When drafting does not pay, it pauses, and is then judged again."""
        if self._pause_left > 0:
            self._pause_left -= 1
            if self._pause_left == 0:
                self._rounds_to_judge = _ROUNDS_TO_JUDGE_IF_USELESS if self._is_useless else _ROUNDS_TO_JUDGE_AGAIN
                self._drafted_tokens, self._drafted_seconds = _Mean(), _Mean()
            return False
        if self._rounds_to_judge > 0:
            return True
        rate, plain = self.tokens_per_second, self._plain_seconds.value
        if rate is None or plain is None or rate >= 1.0 / plain:
            self._pause = _PAUSE
            return True
        growth = _GROWTH_IF_USELESS if self._is_useless else _GROWTH
        self._pause_left, self._pause = self._pause, min(growth * self._pause, _LONGEST_PAUSE)
        return False

    # ---- measurements ----

    def add_verification(self, num_nodes: int, seconds: float) -> None:
        """Records the cost of a round with `num_nodes` nodes, without drafting."""
        if num_nodes == 1:
            self._plain_costs.setdefault(self._range, _Mean()).add(seconds)
        else:
            self._costs.setdefault(self._range, _Line()).add(num_nodes, seconds)

    def add_level(self, width: int, seconds: float) -> None:
        """Records the cost of drafting a level of `width` nodes."""
        self._level_costs.setdefault(width, deque(maxlen=_NUM_COSTS_KEPT)).append(seconds)

    def add_step(self, share: float) -> None:
        """Records the probability of reaching a level, divided by that of reaching the level above it."""
        self._steps.add(share)

    def add_node(self, log_prob: float, is_best: bool, is_accepted: bool) -> None:
        """Records whether a node was accepted."""
        if not log_prob > _LEAST_LOG_PROB:
            return
        index = _bin_index(log_prob)
        self._accepted[is_best][index] = 0.99 * self._accepted[is_best][index] + is_accepted
        self._seen[is_best][index] = 0.99 * self._seen[is_best][index] + 1.0

    def add_round(self, is_drafted: bool, num_tokens: float, seconds: float) -> None:
        """Records the tokens and the time of a whole round."""
        if not is_drafted:
            self._plain_seconds.add(seconds)
            return
        self._rounds_to_judge = max(0, self._rounds_to_judge - 1)
        self._drafted_tokens.add(num_tokens)
        self._drafted_seconds.add(seconds)


def _lower_quartile(costs: Sequence[float]) -> float:
    """The lower quartile as a typical cost. The mean would be too high: the first costs include warming up, and now
    and then another process takes the processor. A width that seems too expensive would never be measured again."""
    return sorted(costs)[len(costs) // 4]


def _bin_index(log_prob: float) -> int:
    return min(_NUM_BINS - 1, int(-log_prob * _BINS_PER_UNIT))


__all__ = ["Experience"]
