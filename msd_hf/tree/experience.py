"""What rounds of drafting and verification have cost and brought so far, for one pair on one machine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence


# Numbers of nodes that are tried, to learn what they cost.
SIZES = (1, 4, 8, 16, 32, 64, 128)
# Each is tried this often, in one round of so many: the first time also pays for warming up.
_TRIALS, _ROUNDS_A_TRIAL = 2, 3
# Larger trees are not tried before a draft has shown some use.
_LARGEST_ON_TRUST = 16
# What a node is taken to add to a verification, until it is known; and what that counts for, in squared nodes.
_PRIOR_SLOPE, _SLOPE_WEIGHT = 0.01, 64.0
_COSTS_KEPT = 15
# Contexts of up to so many slots cost about the same; from there on ranges double.
_FIRST_RANGE = 512

_BINS_PER_OCTAVE, _NUM_BINS = 2, 40
_LEAST_LOG_PROB = -1e3
_PRIOR_WEIGHT = 8.0  # observations that the draft's own probability counts for
_FORGETTING = 0.97  # of old rounds, by each new one
# Rounds without drafting after it did not pay; doubled each time that a trial does not pay either.
_PAUSE, _LONGEST_PAUSE = 16, 512
_ROUNDS_TO_JUDGE, _ROUNDS_OF_A_TRIAL = 4, 2
# What rounds of other calls count for in the pace of one.
_ROUNDS_OF_OTHERS = 4.0


def level_widths(widest: int) -> list[int]:
    """Numbers of nodes of which one level of drafting is made, at most `widest`."""
    return [1 << power for power in range((widest - 1).bit_length())] + [widest]


class _Mean:
    """A mean that forgets."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        self.total = self.total * _FORGETTING + value
        self.weight = self.weight * _FORGETTING + 1.0

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class _Line:
    """What so many nodes cost: a line through rounds, of which it forgets old ones. So all costs follow a machine that
    becomes slower or faster."""

    def __init__(self) -> None:
        self._forget()

    def add(self, num_nodes: int, seconds: float) -> None:
        if self.nodes.weight:
            known = self.at(num_nodes)
            if seconds < known / 4:
                self._forget()  # it was warming up
            seconds = min(seconds, 1.5 * known)  # others take the processor away now and then
        for mean, value in (
            (self.nodes, num_nodes),
            (self.seconds, seconds),
            (self.squares, num_nodes * num_nodes),
            (self.products, num_nodes * seconds),
        ):
            mean.add(value)

    def _forget(self) -> None:
        self.nodes, self.seconds, self.squares, self.products = _Mean(), _Mean(), _Mean(), _Mean()

    @property
    def slope(self) -> float:
        """What a node more costs."""
        mean_nodes, mean_seconds = self._means
        covariance = self.products.total - self.nodes.total * mean_seconds
        variance = self.squares.total - self.nodes.total * mean_nodes
        slope = (covariance + _SLOPE_WEIGHT * _PRIOR_SLOPE * mean_seconds) / (variance + _SLOPE_WEIGHT)
        return min(max(slope, 0.0), mean_seconds / mean_nodes)  # no steeper than from nothing at all

    def at(self, num_nodes: int) -> float:
        """The cost of so many nodes."""
        mean_nodes, mean_seconds = self._means
        return mean_seconds + self.slope * (num_nodes - mean_nodes)

    def up_to(self, num_nodes: int) -> list[float]:
        """The costs of 1, 2, ... nodes."""
        first, slope = self.at(1), self.slope
        return [first + slope * count for count in range(num_nodes)]

    @property
    def _means(self) -> tuple[float, float]:
        return self.nodes.total / self.nodes.weight, self.seconds.total / self.seconds.weight


class Experience:
    """
    Costs in seconds, and acceptance.

    Args:
        max_nodes (`int`): largest tree that is ever built.
    """

    def __init__(self, max_nodes: int):
        self.sizes = [size for size in SIZES if size < max_nodes] + [max_nodes]
        self._costs: dict[int, _Line] = {}  # range of context -> what rounds of several nodes cost
        self._plain_costs: dict[int, _Mean] = {}  # those of one node
        self._trials: dict[int, dict[int, int]] = {}  # range of context -> nodes -> how often tried
        self._range = 0
        self._num_rounds = 0
        self._levels: dict[int, deque[float]] = {}  # number of nodes -> last costs of a level
        self._level_trials: dict[int, int] = {}
        self._drafted_tokens, self._drafted_seconds = _Mean(), _Mean()
        self._plain_seconds = _Mean()
        # Of nodes by log-probability; those that are the best of their level apart from others.
        self._accepted = {is_best: [0.0] * _NUM_BINS for is_best in (False, True)}
        self._seen = {is_best: [0.0] * _NUM_BINS for is_best in (False, True)}
        self._steps = _Mean()
        self._pause = _PAUSE
        self._paused_rounds = 0
        self._trial_rounds = _ROUNDS_TO_JUDGE

    # ---- what there is to know ----

    def enter_context(self, num_slots: int) -> None:
        """Turns to the range of context that a round is in."""
        self._range = max(0, math.ceil(math.log2(max(num_slots, 1) / _FIRST_RANGE)))

    def next_to_explore(self) -> int | None:
        """Nodes that a round's tree shall have, to learn what they cost in this range of context; `None`: as many as
        pay."""
        if self._range not in self._trials:
            # From the middle to both ends: few are enough to interpolate.
            order = sorted(self.sizes, key=lambda size: -abs(math.log2(size / 16)))
            self._trials[self._range] = dict.fromkeys(([16] if 16 in order else []) + order, 0)
        self._num_rounds += 1
        trials = self._trials[self._range]
        is_of_use = (self._drafted_tokens.value or 1.0) > 1.0
        size = min((size for size in trials if is_of_use or size <= _LARGEST_ON_TRUST), key=trials.__getitem__)
        if trials[size] >= _TRIALS or self._num_rounds % _ROUNDS_A_TRIAL != 1:
            return None
        trials[size] += 1  # counted here: a tree may turn out smaller, at the end of a sequence
        return size

    def seconds_up_to(self, num_nodes: int) -> list[float]:
        """What rounds of 1, 2, ... nodes cost besides drafting them."""
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

    def acceptance(self, log_prob: float, is_best: bool) -> float:
        """How likely a node of such a cumulative log-probability, the best of its level or not, is accepted."""
        if not log_prob > _LEAST_LOG_PROB:  # or not a number
            return 0.0
        place = _bin(log_prob)
        accepted, seen = self._accepted[is_best][place], self._seen[is_best][place]
        return (accepted + _PRIOR_WEIGHT * math.exp(log_prob)) / (seen + _PRIOR_WEIGHT)

    @property
    def step(self) -> float:
        """How likely, where a level was reached, the next one is too."""
        return 1.0 if self._steps.value is None else self._steps.value

    def width_to_explore(self, widest: int) -> int:
        """Nodes of a level, of those whose cost is known least."""
        width = min(level_widths(widest), key=lambda width: self._level_trials.get(width, 0))
        self._level_trials[width] = self._level_trials.get(width, 0) + 1
        return width

    @property
    def tokens_per_second(self) -> float | None:
        """What rounds with drafting emit, in the mean."""
        return self.rate_with(0.0, 0.0)

    def rate_with(self, tokens: float, seconds: float) -> float | None:
        """Tokens a second of a call that has emitted so many in so many seconds: until it is long, it is taken to be
        like others."""
        mean_tokens, mean_seconds = self._drafted_tokens.value, self._drafted_seconds.value
        if mean_tokens is None or mean_seconds is None:
            return None
        return (_ROUNDS_OF_OTHERS * mean_tokens + tokens) / (_ROUNDS_OF_OTHERS * mean_seconds + seconds)

    def seconds_of_level(self, width: int) -> float | None:
        """What another level of drafting costs, and the verification of as many nodes."""
        if not self._levels:
            return None
        # A level costs no more than a wider one, whatever its first times have cost.
        known = [_usual(costs) for nodes, costs in self._levels.items() if nodes >= width]
        seconds = min(known) if known else _usual(self._levels[max(self._levels)])
        line = self._costs.get(self._range)
        return seconds + (0.0 if line is None else width * line.slope)

    def drafting_pays(self) -> bool:
        """Whether this round should draft: after it did not pay, only every now and then, to see whether it would."""
        if self._paused_rounds > 0:
            self._paused_rounds -= 1
            if self._paused_rounds == 0:
                self._trial_rounds = _ROUNDS_OF_A_TRIAL
                self._drafted_tokens, self._drafted_seconds = _Mean(), _Mean()
            return False
        if self._trial_rounds > 0:
            return True
        rate, plain = self.tokens_per_second, self._plain_seconds.value
        if rate is None or plain is None or rate >= 1.0 / plain:
            self._pause = _PAUSE
            return True
        self._paused_rounds, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return False

    # ---- what is learnt ----

    def add_verification(self, num_nodes: int, seconds: float) -> None:
        """Takes note of what a round of so many nodes cost besides drafting."""
        if num_nodes == 1:
            self._plain_costs.setdefault(self._range, _Mean()).add(seconds)
        else:
            self._costs.setdefault(self._range, _Line()).add(num_nodes, seconds)

    def add_level(self, width: int, seconds: float) -> None:
        """Takes note of what drafting a level of so many nodes cost."""
        self._levels.setdefault(width, deque(maxlen=_COSTS_KEPT)).append(seconds)

    def add_step(self, share: float) -> None:
        """Takes note of how much less than its parents' level one was likely to be reached."""
        self._steps.add(share)

    def add_node(self, log_prob: float, is_best: bool, is_accepted: bool) -> None:
        """Takes note of a node's fate."""
        if not log_prob > _LEAST_LOG_PROB:
            return
        place = _bin(log_prob)
        self._accepted[is_best][place] = 0.99 * self._accepted[is_best][place] + is_accepted
        self._seen[is_best][place] = 0.99 * self._seen[is_best][place] + 1.0

    def add_round(self, is_drafted: bool, num_tokens: float, seconds: float) -> None:
        """Takes note of a whole round."""
        if not is_drafted:
            self._plain_seconds.add(seconds)
            return
        self._trial_rounds = max(0, self._trial_rounds - 1)
        self._drafted_tokens.add(num_tokens)
        self._drafted_seconds.add(seconds)


def _usual(costs: Sequence[float]) -> float:
    """Their lower quartile. Not the mean: the first time also pays for warming up, and others take the processor away
    now and then; what was once dear would not be tried again."""
    return sorted(costs)[len(costs) // 4]


def _bin(log_prob: float) -> int:
    return min(_NUM_BINS - 1, int(-log_prob * _BINS_PER_OCTAVE / math.log(2)))


__all__ = ["Experience"]
