"""Measured costs of drafting and verification, and measured acceptance, for one pair on one machine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .acceptance import Acceptance
from .running_mean import RunningMean
from .state import count, number


# Sizes of trees, in nodes, that are drafted to measure their costs.
SIZES = (1, 4, 8, 16, 32, 64, 128)
# Each size is measured twice, because the first measurement includes warming up, in at most one round of three.
_TRIALS_PER_SIZE, _ROUNDS_PER_TRIAL = 2, 3
# Nodes of one forward, over all rows of a batch. Trees are measured first with about `_UNPROVEN_NODES`, and with more
# only when rounds with drafting emit more than one token on average. Above `_MOST_EXPLORED_NODES` a measurement costs
# more than it tells: the costs of smaller forwards are extended.
_UNPROVEN_NODES, _MOST_EXPLORED_NODES = 16, 256
# Assumed cost of one more node of a forward, as a share of the mean cost; and the weight of this assumption, in
# squared nodes.
_PRIOR_SLOPE, _SLOPE_WEIGHT = 0.01, 64.0
# Weight of costs that come from a file, in rounds: another machine of the same kind may be faster.
_MOST_LOADED_ROUNDS = 8.0
_NUM_COSTS_KEPT = 15  # latest costs of each width of a level
# Costs are kept by range of context lengths. The first range ends at this many slots, the next ones at twice, four
# times, ... as many.
_FIRST_RANGE = 512

# When drafting does not pay, it pauses for this number of rounds. The pause grows by a factor each time that drafting
# still does not pay after it, and by a larger one if nothing at all was accepted.
_PAUSE, _LONGEST_PAUSE = 16, 512
_GROWTH, _GROWTH_IF_USELESS = 2, 4
# Rounds with drafting before it is judged: at first, after a pause, and after a pause because nothing was accepted.
# One round is enough then: if it accepts nothing again, little is lost by another pause.
_ROUNDS_TO_JUDGE, _ROUNDS_TO_JUDGE_AGAIN, _ROUNDS_TO_JUDGE_IF_USELESS = 4, 2, 1
# Weight of the mean over all calls in the rate of one call, in rounds.
_PRIOR_ROUNDS = 4.0
_LARGEST_CLASS = 20  # of numbers of rows, in a file


def level_widths(widest: int) -> list[int]:
    """The widths that a level of drafting may have: the powers of two below `widest`, and `widest`."""
    return [1 << power for power in range((widest - 1).bit_length())] + [widest]


class _Line:
    """Cost as a linear function of the number of nodes, fitted to rounds. Old rounds lose weight, so when the machine
    becomes slower or faster, the costs of all sizes follow. `prior_slope` is the assumed cost of one more node of each
    tree, as a share of the mean cost."""

    def __init__(self, prior_slope: float = _PRIOR_SLOPE) -> None:
        self.prior_slope = prior_slope
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
        self.nodes, self.seconds = RunningMean(), RunningMean()
        self.squares, self.products = RunningMean(), RunningMean()

    def state(self) -> list[list[float]]:
        """The fitted means, for a file."""
        return [mean.state() for mean in (self.nodes, self.seconds, self.squares, self.products)]

    def load_state(self, state: Any) -> None:
        """Takes over a `state()`."""
        self.nodes, self.seconds, self.squares, self.products = (
            RunningMean.of_state(mean, _MOST_LOADED_ROUNDS) for mean in state
        )
        if not (self.nodes.weight and self.nodes.total and self.seconds.total):
            raise ValueError("it holds costs of no rounds.")

    @property
    def slope(self) -> float:
        """Cost of one more node, in seconds."""
        mean_nodes, mean_seconds = self._means
        covariance = self.products.total - self.nodes.total * mean_seconds
        variance = self.squares.total - self.nodes.total * mean_nodes
        slope = (covariance + _SLOPE_WEIGHT * self.prior_slope * mean_seconds) / (variance + _SLOPE_WEIGHT)
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
        num_rows (`int`, defaults to 1): rows of the batches, of which each gets a tree.
        acceptance (`Acceptance`, *optional*): is shared with the experiences of other batch sizes.

    Attributes:
        sizes (`list[int]`): sizes of trees that are drafted to measure their costs.
    """

    def __init__(self, max_nodes: int, num_rows: int = 1, acceptance: Acceptance | None = None):
        self.max_nodes = max_nodes
        self.acceptance = Acceptance() if acceptance is None else acceptance
        self.lock = self.acceptance.lock
        self._largest_unproven_size = max(_UNPROVEN_NODES // num_rows, 2)
        most = max(_MOST_EXPLORED_NODES // num_rows, self._largest_unproven_size)
        sizes = {*SIZES, self._largest_unproven_size, max_nodes}
        self.sizes = sorted(size for size in sizes if size <= min(most, max_nodes))
        self._prior_slope = num_rows * _PRIOR_SLOPE
        self._by_rows: dict[int, Experience] = {_class_of(num_rows): self}
        # By range of context lengths. The costs exclude drafting.
        self._costs: dict[int, _Line] = {}  # rounds with several nodes
        self._plain_costs: dict[int, RunningMean] = {}  # rounds with one node
        self._num_trials: dict[int, dict[int, int]] = {}  # size of a tree -> number of measurements
        self._num_slots, self._range = 0, 0  # the current context length, and its range
        self._num_rounds = 0
        # By width of a level.
        self._level_costs: dict[int, deque[float]] = {}
        self._num_level_trials: dict[int, int] = {}
        # Whole rounds, with and without drafting.
        self._drafted_tokens, self._drafted_seconds = RunningMean(), RunningMean()
        self._plain_seconds = RunningMean()
        self._pause = _PAUSE
        self._pause_left = 0
        self._rounds_to_judge = _ROUNDS_TO_JUDGE

    def for_rows(self, num_rows: int) -> Experience:
        """The experience with batches of about this number of rows (1, 2, 3 to 4, 5 to 8, ...). Costs are measured
        separately, because more rows cost more; acceptance is shared."""
        number = _class_of(num_rows)
        with self.lock:
            if number not in self._by_rows:
                made = Experience(self.max_nodes, 1 << number, self.acceptance)
                made._by_rows = self._by_rows
                if self._is_useless and self._rounds_to_judge == 0:  # to judge it again, one round is enough
                    made._rounds_to_judge = _ROUNDS_TO_JUDGE_IF_USELESS
                self._by_rows[number] = made
            return self._by_rows[number]

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
            # 16 for one row, then the sizes furthest from it: a few costs are enough to interpolate the others.
            first = self._largest_unproven_size
            order = sorted(self.sizes, key=lambda size: -abs(math.log2(size / first)))
            self._num_trials[self._range] = dict.fromkeys(([first] if first in order else []) + order, 0)
        self._num_rounds += 1
        num_trials = self._num_trials[self._range]
        is_proven = (self._drafted_tokens.value or 1.0) > 1.0
        if not is_proven and self._rounds_to_judge == 0:
            return None  # nothing was accepted, so no size pays, whatever it costs
        size = min(
            (size for size in num_trials if is_proven or size <= self._largest_unproven_size),
            key=num_trials.__getitem__,
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
            [1.0 + self._prior_slope * nodes for nodes in range(1, num_nodes + 1)]
            if line is None
            else line.up_to(num_nodes)
        )
        if plain is not None and plain.value is not None:
            if line is None:
                costs = [plain.value * cost for cost in costs]
            costs[0] = min(plain.value, costs[0])
        return costs

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
                self._drafted_tokens, self._drafted_seconds = RunningMean(), RunningMean()
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
            self._plain_costs.setdefault(self._range, RunningMean()).add(seconds)
        else:
            self._costs.setdefault(self._range, _Line(self._prior_slope)).add(num_nodes, seconds)

    def add_level(self, width: int, seconds: float) -> None:
        """Records the cost of drafting a level of `width` nodes."""
        self._level_costs.setdefault(width, deque(maxlen=_NUM_COSTS_KEPT)).append(seconds)

    def add_round(self, is_drafted: bool, num_tokens: float, seconds: float) -> None:
        """Records the tokens and the time of a whole round."""
        if not is_drafted:
            self._plain_seconds.add(seconds)
            return
        self._rounds_to_judge = max(0, self._rounds_to_judge - 1)
        self._drafted_tokens.add(num_tokens)
        self._drafted_seconds.add(seconds)

    # ---- on disk ----

    @property
    def has_measured(self) -> bool:
        """Whether there is anything to save."""
        return any(one._num_rounds for one in self._by_rows.values())

    def state(self) -> dict[str, Any]:
        """What was measured, acceptance and the costs for all numbers of rows, for a file."""
        with self.lock:
            rows = {str(rows_class): one._own_state() for rows_class, one in self._by_rows.items() if one._num_rounds}
            return {"acceptance": self.acceptance.state(), "rows": rows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """
        Takes over a `state()`. Costs count as those of a few rounds.

        Raises:
            ValueError, TypeError, KeyError: when the state is damaged.
        """
        self.acceptance.load_state(state["acceptance"])
        for rows_class, saved in state["rows"].items():
            if count(rows_class) > _LARGEST_CLASS:
                raise ValueError(f"it holds costs of 2 to the power of {count(rows_class)} rows.")
            self.for_rows(1 << count(rows_class))._load_own_state(saved)

    def _own_state(self) -> dict[str, Any]:
        return {
            "costs": {str(key): line.state() for key, line in self._costs.items()},
            "plain_costs": {str(key): mean.state() for key, mean in self._plain_costs.items()},
            "trials": {str(key): {str(size): num for size, num in v.items()} for key, v in self._num_trials.items()},
            "levels": {str(width): list(costs) for width, costs in self._level_costs.items()},
            "level_trials": {str(width): num for width, num in self._num_level_trials.items()},
            "whole_rounds": [mean.state() for mean in self._whole_rounds()],
            "num_rounds": self._num_rounds,
            "pause": [self._pause, self._pause_left, self._rounds_to_judge],
        }

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        for key, saved in state["costs"].items():
            self._costs[count(key)] = line = _Line(self._prior_slope)
            line.load_state(saved)
        for key, saved in state["plain_costs"].items():
            self._plain_costs[count(key)] = RunningMean.of_state(saved, _MOST_LOADED_ROUNDS)
        for key, trials in state["trials"].items():
            self._num_trials[count(key)] = {size: count(trials.get(str(size), 0)) for size in self.sizes}
        for width, costs in state["levels"].items():
            if not costs:
                raise ValueError("it holds a level without costs.")
            kept = [number(cost) for cost in costs][: _NUM_COSTS_KEPT // 3]
            self._level_costs[count(width)] = deque(kept, maxlen=_NUM_COSTS_KEPT)
        self._num_level_trials = {count(width): count(num) for width, num in state["level_trials"].items()}
        self._drafted_tokens, self._drafted_seconds, self._plain_seconds = (
            RunningMean.of_state(mean, _MOST_LOADED_ROUNDS) for mean in state["whole_rounds"]
        )
        self._num_rounds = count(state["num_rounds"])
        pause, left, to_judge = (count(value) for value in state["pause"])
        self._pause = min(max(pause, _PAUSE), _LONGEST_PAUSE)
        self._pause_left, self._rounds_to_judge = min(left, _LONGEST_PAUSE), min(to_judge, _ROUNDS_TO_JUDGE)

    def _whole_rounds(self) -> tuple[RunningMean, RunningMean, RunningMean]:
        return self._drafted_tokens, self._drafted_seconds, self._plain_seconds


def _class_of(num_rows: int) -> int:
    """Numbers of rows with the same result share an experience: 1, 2, 3 to 4, 5 to 8, ..."""
    return (num_rows - 1).bit_length()


def _lower_quartile(costs: Sequence[float]) -> float:
    """The lower quartile as a typical cost. The mean would be too high: the first costs include warming up, and now
    and then another process takes the processor. A width that seems too expensive would never be measured again."""
    return sorted(costs)[len(costs) // 4]


__all__ = ["Experience"]
