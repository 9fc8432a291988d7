"""The size of each round's candidate tree: fixed, or chosen by what pays on this machine with this draft."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from .candidate import CandidateTree
from .experience import Experience, level_widths
from .growth import TreeGrowth
from .settings import TreeSettings


# Assumed cost of a level, in tokens, until costs are measured.
_INITIAL_PRICE = 0.2


class TreePolicy:
    """
    Gives all trees the size that the settings name.

    Args:
        settings (`TreeSettings`): the size of the trees.
    """

    def __init__(self, settings: TreeSettings):
        self.settings = settings

    @property
    def is_paused(self) -> bool:
        """Whether the next rounds draft nothing, because drafting does not pay."""
        return False

    def leave_out(self, seconds: float) -> None:
        """Leaves out time at the beginning of this round that other rounds do not need."""

    def begin_round(self, tokens_left: int | None, num_slots: int, num_rows: int = 1) -> TreeSettings:
        """
        Begins a round, and returns the bounds of its tree.

        Args:
            tokens_left (`int`, *optional*): tokens that may still be emitted; `None`: no limit.
            num_slots (`int`): length of the context, in slots.
            num_rows (`int`, defaults to 1): rows of the batch that still run.
        """
        return self.settings.limited_to(tokens_left)

    def width(self, growth: TreeGrowth) -> int:
        """How many nodes of the frontier to expand; 0 ends the growth. Called before each expansion but the first."""
        return self.settings.top_k

    def num_nodes(self, growth: TreeGrowth) -> int:
        """How many nodes the grown tree keeps, the root included."""
        return growth.settings.num_nodes

    def begin_verification(self) -> None:
        """Notes that the tree is drafted and its verification begins."""

    def end_round(self, tree: CandidateTree, paths: Sequence[Sequence[int]]) -> None:
        """Ends a round, given the nodes that were accepted in each row."""


class AdaptiveTreePolicy(TreePolicy):
    """
    Chooses the trees that emit the most tokens per second, judged by the measured costs of verifications and draft
    levels, and by how often nodes were accepted. When drafting does not pay, it drafts no tree, and tries again from
    time to time.

    The measurements are kept between calls, separately for each pair of draft and target, device, dtype, range of
    context lengths and number of rows that still run: when most rows of a batch have ended, larger trees pay for the
    others.

    Args:
        settings (`TreeSettings`): bounds of the size of the trees.
        experience (`Experience`): measurements of earlier rounds and calls.
        eos_token_ids (`Collection[int]`): tokens that end the output.
    """

    def __init__(
        self,
        settings: TreeSettings,
        experience: Experience,
        eos_token_ids: Collection[int] = (),
    ):
        super().__init__(settings)
        self.experience = experience
        self.eos_token_ids = frozenset(eos_token_ids)
        self._widths = level_widths(settings.top_k)
        self._undrafted = TreeSettings(1, 0, settings.top_k)
        self._drafts = True  # whether this round drafts a tree
        self._tokens = self._seconds = 0.0  # totals of this call's rounds
        self._num_slots = 0  # length of this round's context
        self._round_start = self._verification_start = 0.0
        self._explored_size: int | None = None  # nodes of a tree that is drafted to measure its cost
        self._reach: float | None = None  # probability that the accepted path reaches the last level
        self._level: tuple[int, float] | None = None  # width and start time of the level that is being drafted
        self._prices: dict[int, float] = {}  # width of a level -> its cost, in tokens
        self._best_scores: list[set[float]] = []  # for each row, the score of the best node of each level

    @property
    def is_paused(self) -> bool:
        return self.experience.is_paused

    def leave_out(self, seconds: float) -> None:
        self._round_start += seconds

    def begin_round(self, tokens_left: int | None, num_slots: int, num_rows: int = 1) -> TreeSettings:
        experience = self.experience.for_rows(num_rows)
        if experience is not self.experience:  # rows have ended, so that a round costs less
            self.experience = experience
            self._tokens = self._seconds = 0.0
        self._num_slots = num_slots
        self._round_start = time.perf_counter()
        self._reach, self._level, self._best_scores = None, None, []
        with self._sharing_experience():
            self._explored_size = self.experience.next_to_explore()
            self._drafts = self.experience.drafting_pays() if self._explored_size is None else self._explored_size > 1
            if not self._drafts:
                return self._undrafted
            self._prices = self._current_prices()
        return self.settings.limited_to(tokens_left)

    @contextmanager
    def _sharing_experience(self) -> Iterator[None]:
        """Keeps other threads from the experience inside the block, with the statistics for this call's context."""
        with self.experience.lock:
            self.experience.enter_context(self._num_slots)
            yield

    def width(self, growth: TreeGrowth) -> int:
        scores, tokens = growth.frontier_scores.tolist(), growth.frontier_tokens.tolist()
        level_end = time.perf_counter()  # after `tolist`, which waits until a GPU has computed the level
        self._best_scores = self._best_scores or [set() for _ in scores]
        for best, row in zip(self._best_scores, scores, strict=True):
            best.add(row[0])
        with self._sharing_experience():
            self._end_level(level_end)
            width = self._choose_width(growth, scores, tokens)
        if width:
            self._level = (width, time.perf_counter())
        return width

    def _choose_width(self, growth: TreeGrowth, scores: list[list[float]], tokens: list[list[int]]) -> int:
        widest = growth.settings.top_k
        if self._explored_size is not None:
            if growth.num_nodes >= self._explored_size:
                return 0
            return self.experience.width_to_explore(widest)
        for row, row_tokens in zip(scores, tokens, strict=True):
            if not self.eos_token_ids.isdisjoint(row_tokens):
                ends = (token in self.eos_token_ids for token in row_tokens)
                row[:] = [-math.inf if is_end else score for score, is_end in zip(row, ends, strict=True)]
        chances = self._chances(scores)
        reach = min(1.0, sum(chances))
        if reach == 0.0:  # the output ends here, which says nothing about other levels
            return 0
        step = self._record_reach(reach)
        sums = list(accumulate(chances, initial=0.0))
        gains = {
            width: min(1.0, sums[min(width, len(chances))]) * step - price for width, price in self._prices.items()
        }
        best_width = max(gains, key=gains.__getitem__)
        return best_width if gains[best_width] > 0.0 else 0

    def _record_reach(self, reach: float) -> float:
        """
        Records the probability that the accepted path reaches the last level.

        Returns:
            The probability that a path which reaches the last level also reaches the next one. It is a mean over trees
            and not this tree's own, because after an unsure token the draft is as sure as ever.
        """
        if self._reach:
            self.experience.acceptance.add_step(min(1.0, reach / self._reach))
        self._reach = reach
        return self.experience.acceptance.step

    def _chances(self, scores: list[list[float]]) -> list[float]:
        """The probabilities that nodes with the given scores (one list per row) are accepted, averaged over rows."""
        acceptance = self.experience.acceptance
        rows = [acceptance.chances(row, best) for best, row in zip(self._best_scores, scores, strict=True)]
        return rows[0] if len(rows) == 1 else [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def _current_prices(self) -> dict[int, float]:
        """The cost of a level of each width, in tokens: how many this call emits in the time that the level takes."""
        costs, rate = self.experience.seconds_of_levels(self._widths), self._rate
        if costs is None or rate is None:
            return dict.fromkeys(self._widths, _INITIAL_PRICE)
        return {width: seconds * rate for width, seconds in zip(self._widths, costs, strict=True)}

    @property
    def _rate(self) -> float | None:
        """Tokens per second of this call; `None` before drafting was measured."""
        return self.experience.rate_with(self._tokens, self._seconds)

    def _end_level(self, now: float) -> None:
        if self._level is not None:
            width, start = self._level
            self.experience.add_level(width, now - start)
            self._level = None

    def num_nodes(self, growth: TreeGrowth) -> int:
        max_nodes = growth.num_nodes
        scores = growth.best_scores(max_nodes - 1).tolist()
        level_end = time.perf_counter()
        self._best_scores = self._best_scores or [set() for _ in scores]
        with self._sharing_experience():
            self._end_level(level_end)
            if self._explored_size is not None:
                return min(max_nodes, self._explored_size)
            return self._paying_size(max_nodes, scores)

    def _paying_size(self, max_nodes: int, scores: list[list[float]]) -> int:
        """The number of nodes up to `max_nodes` that emits the most tokens per second, given the scores of the best
        nodes (one list per row)."""
        chances = self._chances(scores)
        # Costs, and expected tokens, of trees with 1, 2, ... nodes.
        costs, rate = self.experience.seconds_up_to(max_nodes), self._rate
        tokens = list(accumulate(chances, initial=1.0))
        if rate is None:
            spent = time.perf_counter() - self._round_start
            gains = [emitted / (spent + cost) for emitted, cost in zip(tokens, costs, strict=True)]
        else:  # a cost in seconds counts as the tokens that are emitted in this time
            gains = [emitted - rate * cost for emitted, cost in zip(tokens, costs, strict=True)]
        return 1 + max(range(max_nodes), key=gains.__getitem__)

    def begin_verification(self) -> None:
        self._verification_start = time.perf_counter()

    def end_round(self, tree: CandidateTree, paths: Sequence[Sequence[int]]) -> None:
        experience, num_nodes = self.experience, tree.tokens.shape[1]
        emitted = sum(len(path) for path in paths) / len(paths)
        round_end = time.perf_counter()
        if self._drafts:
            self.add_to_call(emitted, round_end - self._round_start)
        with self._sharing_experience():
            experience.add_round(self._drafts, emitted, round_end - self._round_start)
            experience.add_verification(num_nodes, round_end - self._verification_start)
            if not self._drafts or tree.scores is None:
                return
            for scores, path, best in zip(tree.scores[:, 1:].tolist(), paths, self._best_scores, strict=True):
                accepted = set(path)
                for node, score in enumerate(scores, start=1):
                    experience.acceptance.add_node(score, score in best, node in accepted)

    def add_to_call(self, tokens: float, seconds: float) -> None:
        """Records the tokens and the time of rounds of this call."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds


__all__ = ["AdaptiveTreePolicy", "TreePolicy"]
