"""How large the candidate tree of each round is: as set, or as large as pays on this machine with this draft."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from itertools import accumulate

from .candidate import CandidateTree
from .experience import Experience, level_widths
from .growth import TreeGrowth
from .settings import TreeSettings


# With less to go on than this, a level is added while a node of the frontier is accepted with this probability.
_INITIAL_REACH = 0.2


class TreePolicy:
    """
    Trees of the size that is set.

    Args:
        settings (`TreeSettings`): the size.
    """

    def __init__(self, settings: TreeSettings):
        self.settings = settings

    def begin_round(self, tokens_left: int | None, num_slots: int) -> TreeSettings:
        """
        The bounds of this round's tree.

        Args:
            tokens_left (`int`, *optional*): tokens that may still be emitted.
            num_slots (`int`): length of the context.
        """
        return self.settings.limited_to(tokens_left)

    def width(self, growth: TreeGrowth) -> int:
        """How many nodes of the last level are expanded, 0 for none; asked before each expansion but the first."""
        return self.settings.top_k

    def num_nodes(self, growth: TreeGrowth) -> int:
        """Nodes that the full-grown tree keeps, the root included."""
        return growth.settings.num_nodes

    def begin_verification(self) -> None:
        """Is told that the tree is drafted."""

    def end_round(self, tree: CandidateTree, paths: Sequence[Sequence[int]]) -> None:
        """Is told which nodes of the tree were accepted in each row."""


class AdaptiveTreePolicy(TreePolicy):
    """
    Trees that emit the most tokens a second, by what verifications and draft levels have cost and by how often nodes
    were accepted so far. Where nothing is gained it drafts no tree at all, and tries again from time to time.

    What is learnt is kept for the pair of draft and target, for the device, dtype, batch size and range of context.

    Args:
        settings (`TreeSettings`): bounds.
        experience (`Experience`): of earlier rounds and calls.
        eos_token_ids (`Collection[int]`): tokens behind which nothing is emitted.
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
        self._drafts = True
        self._tokens = self._seconds = 0.0  # of this call's rounds
        self._began = self._drafted = 0.0
        self._explored: int | None = None  # nodes that this round is to have, to learn what they cost
        self._reach: float | None = None
        self._level: tuple[int, float] | None = None  # width of the level being drafted, and when it began
        self._prices: dict[int, float] = {}  # of levels by width, in tokens
        self._best: list[set[float]] = []  # scores of the best nodes of the levels, by row

    def begin_round(self, tokens_left: int | None, num_slots: int) -> TreeSettings:
        self.experience.enter_context(num_slots)
        self._began = time.perf_counter()
        self._reach, self._level, self._best = None, None, []
        self._explored = self.experience.next_to_explore()
        self._drafts = self.experience.drafting_pays() if self._explored is None else self._explored > 1
        if not self._drafts:
            return TreeSettings(1, 0, self.settings.top_k)
        self._prices = {width: self._price(width) for width in level_widths(self.settings.top_k)}
        return self.settings.limited_to(tokens_left)

    def width(self, growth: TreeGrowth) -> int:
        scores, tokens = growth.frontier_scores.tolist(), growth.frontier_tokens.tolist()
        self._end_level()  # not before they are read, which waits for a GPU
        self._best = self._best or [set() for _ in scores]
        for best, row in zip(self._best, scores, strict=True):
            best.add(row[0])
        width = self._choose_width(growth, scores, tokens)
        if width:
            self._level = (width, time.perf_counter())
        return width

    def _choose_width(self, growth: TreeGrowth, scores: list[list[float]], tokens: list[list[int]]) -> int:
        widest = growth.settings.top_k
        if self._explored is not None:
            if growth.num_nodes >= self._explored:
                return 0
            return self.experience.width_to_explore(widest)
        for row, row_tokens in zip(scores, tokens, strict=True):
            if not self.eos_token_ids.isdisjoint(row_tokens):
                ends = (token in self.eos_token_ids for token in row_tokens)
                row[:] = [-math.inf if is_end else score for score, is_end in zip(row, ends, strict=True)]
        chances = self._chances(scores)
        reach = min(1.0, sum(chances))
        if reach == 0.0:  # the answer ends here, which says nothing of other levels
            return 0
        step = self._step(reach)
        gains = {width: min(1.0, sum(chances[:width])) * step - price for width, price in self._prices.items()}
        best = max(gains, key=gains.__getitem__)
        return best if gains[best] > 0.0 else 0

    def _step(self, reach: float) -> float:
        """How much less than a level the next one is reached. Not by what this tree's last levels did: behind a token
        that the draft is unsure of it is as sure as ever."""
        if self._reach:
            self.experience.add_step(min(1.0, reach / self._reach))
        self._reach = reach
        return self.experience.step

    def _chances(self, scores: list[list[float]]) -> list[float]:
        """How likely nodes of such scores (B rows) are accepted, in the mean over a batch."""
        acceptance = self.experience.acceptance
        rows = [
            [acceptance(score, score in best) for score in row] for best, row in zip(self._best, scores, strict=True)
        ]
        return rows[0] if len(rows) == 1 else [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def _price(self, width: int) -> float:
        seconds, rate = self.experience.seconds_of_level(width), self._rate
        return _INITIAL_REACH if seconds is None or rate is None else seconds * rate

    @property
    def _rate(self) -> float | None:
        """Tokens that this call emits a second: so many are worth as much as a second that is saved."""
        return self.experience.rate_with(self._tokens, self._seconds)

    def _end_level(self) -> None:
        if self._level is not None:
            width, began = self._level
            self.experience.add_level(width, time.perf_counter() - began)
            self._level = None

    def num_nodes(self, growth: TreeGrowth) -> int:
        most = growth.num_nodes
        scores = growth.best_scores(most - 1).tolist()
        self._best = self._best or [set() for _ in scores]
        self._end_level()
        if self._explored is not None:
            return min(most, self._explored)
        chances = self._chances(scores)
        costs, rate = self.experience.seconds_up_to(most), self._rate
        tokens = list(accumulate(chances, initial=1.0))
        if rate is None:
            spent = time.perf_counter() - self._began
            gains = [emitted / (spent + cost) for emitted, cost in zip(tokens, costs, strict=True)]
        else:  # what other rounds would emit in the time is lost
            gains = [emitted - rate * cost for emitted, cost in zip(tokens, costs, strict=True)]
        return 1 + max(range(most), key=gains.__getitem__)

    def begin_verification(self) -> None:
        self._drafted = time.perf_counter()

    def end_round(self, tree: CandidateTree, paths: Sequence[Sequence[int]]) -> None:
        experience, num_nodes = self.experience, tree.tokens.shape[1]
        emitted = sum(len(path) for path in paths) / len(paths)
        ended = time.perf_counter()
        experience.add_round(self._drafts, emitted, ended - self._began)
        if self._drafts:
            self.add_to_call(emitted, ended - self._began)
        experience.add_verification(num_nodes, ended - self._drafted)
        if self._drafts and tree.scores is not None:
            for scores, path, best in zip(tree.scores[:, 1:].tolist(), paths, self._best, strict=True):
                accepted = set(path)
                for node, score in enumerate(scores, start=1):
                    experience.add_node(score, score in best, node in accepted)

    def add_to_call(self, tokens: float, seconds: float) -> None:
        """Takes note of what rounds of this call emitted in which time."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds


__all__ = ["AdaptiveTreePolicy", "TreePolicy"]
