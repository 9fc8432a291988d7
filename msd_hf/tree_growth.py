"""Growth and re-ranking of candidate trees as pure tensor operations (paper section 3.2; EAGLE-2)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .errors import MSDError
from .tree import CandidateTree, TreeSettings


_LOWEST_LOG_PROB = -1e30


class TreeTables(NamedTuple):
    """What trees of one size have in common, see [`TreeGrowth`]."""

    groups: torch.Tensor  # [n]: the group of K that each number is in
    in_order: torch.Tensor  # [B, K]: 0, 1, ... in each row
    root_scores: torch.Tensor  # [B, 1]: zeros

    @classmethod
    def like(cls, log_probs: torch.Tensor, count: int) -> TreeTables:
        """Tables for trees with candidates such as `log_probs` `[B, F, K]`, and for numbers below `count`."""
        batch_size, _, top_k = log_probs.shape
        numbers = torch.arange(max(count, top_k), device=log_probs.device)
        return cls(numbers // top_k, numbers[:top_k].expand(batch_size, -1), log_probs.new_zeros(batch_size, 1))

    def fits(self, log_probs: torch.Tensor, count: int) -> bool:
        """Whether they are what `like` would make, or more of it."""
        batch_size, _, top_k = log_probs.shape
        return (
            self.in_order.shape == (batch_size, top_k)
            and self.groups.shape[0] >= count
            and self.root_scores.dtype == log_probs.dtype
        )


class TreeGrowth:
    """Grows a tree level by level: each node of the frontier proposes `top_k` tokens, the `top_k` best of these by
    cumulative log-probability are the next frontier, and in the end the best of all are kept.

    Candidates are numbered level by level; the root is candidate 0.

    Args:
        root (`torch.LongTensor` of shape `[B]`): the last emitted token.
        settings (`TreeSettings`): the size of the tree.
        tables (`TreeTables`, *optional*): those of an earlier tree, to be used again if they fit.
    """

    def __init__(self, root: torch.Tensor, settings: TreeSettings, tables: TreeTables | None = None):
        self.root = root
        self.settings = settings
        self.tables = tables
        # Of each level: tokens [B, F, K], and cumulative log-probabilities [B, F * K].
        self._tokens: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._num_candidates = 1
        self._width, self._top_k = 0, 0  # F of the last level, and K: a small vocabulary has fewer than is set
        # Of the nodes that were expanded, level by level: places among the candidates of their level, [B, F].
        self._expanded: list[torch.Tensor] = []
        self._frontier: tuple[torch.Tensor, ...] | None = None  # scores, tokens and places, best first
        self._ranking: tuple[torch.Tensor, torch.Tensor] | None = None  # scores and numbers of all, best first

    @property
    def frontier_scores(self) -> torch.Tensor:
        """Cumulative log-probabilities of the frontier, `[B, K]`, best first; NaN where the draft overflowed."""
        return self._best_of_level()[0]

    @property
    def frontier_tokens(self) -> torch.Tensor:
        """The tokens of the frontier, `[B, K]`."""
        return self._best_of_level()[1]

    @property
    def num_nodes(self) -> int:
        """Nodes that there would be now, the root included."""
        return min(self.settings.num_nodes, self._num_candidates)

    def best_scores(self, count: int) -> torch.Tensor:
        """The cumulative log-probabilities of the best candidates of all levels, `[B, count]`, best first."""
        return self._ranked()[0][:, 1 : count + 1]

    def expand(self, log_probs: torch.Tensor, tokens: torch.Tensor) -> None:
        """Adds the candidates of one level.

        Args:
            log_probs (`torch.Tensor` of shape `[B, F, K]`): the K best log-probabilities, best first, at each of the F
                nodes of the frontier (F is 1 at the root, after it what `descend` was told).
            tokens (`torch.LongTensor` of shape `[B, F, K]`): their tokens.
        """
        batch_size, self._width, self._top_k = log_probs.shape
        if self._scores:
            assert self._frontier is not None
            log_probs = log_probs + self._frontier[0].unsqueeze(2)
        else:
            # Places among the candidates of a level in all rows, and numbers of all candidates with K for the root.
            count = max(batch_size, self.settings.depth + 2) * self._top_k * max(self.settings.top_k, self._top_k)
            if self.tables is None or not self.tables.fits(log_probs, count):
                self.tables = TreeTables.like(log_probs, count)
            self._scores.append(self.tables.root_scores)
        self._tokens.append(tokens)
        self._scores.append(log_probs.reshape(batch_size, -1))
        self._num_candidates += self._width * self._top_k
        self._frontier = self._ranking = None

    def descend(self, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Moves the frontier to the `width` best candidates of the last level.

        Returns:
            Their tokens (`[B, width]`), and for each the row of the node above it among the B * F rows of the frontier
            before (`[B * width]`); `None` if that was one node.
        """
        frontier = self._best_of_level()
        if width < self._top_k:
            frontier = self._frontier = tuple(part[:, :width] for part in frontier)
        _, tokens, places = frontier
        self._expanded.append(places)
        if self._width == 1:
            return tokens, None
        assert self.tables is not None
        return tokens, self.tables.groups.take(self._among_all(places)).view(-1)

    def finish(self, num_nodes: int | None = None) -> CandidateTree:
        """Keeps the best candidates of all levels, in flat order: as many as set, or fewer (`num_nodes`)."""
        num_kept = self.num_nodes if num_nodes is None else min(num_nodes, self.num_nodes)
        if num_kept == 1:
            return CandidateTree.bare(self.root)
        scores, numbers = self._ranked()
        kept, order = numbers.narrow(1, 0, num_kept).sort(dim=1)  # [B, N]
        # The parent of a kept candidate is kept too.
        parents = torch.searchsorted(kept, self._parents_of(kept))
        batch_size = kept.shape[0]
        tokens = torch.cat([tokens.reshape(batch_size, -1) for tokens in (self.root, *self._tokens)], dim=1)
        return CandidateTree.from_parents(
            tokens.gather(1, kept), parents, max_depth=len(self._tokens), scores=scores.gather(1, order)
        )

    def _best_of_level(self) -> tuple[torch.Tensor, ...]:
        if self._frontier is None:
            if not self._scores:
                raise MSDError("The root has not been expanded yet.")
            scores, tokens = self._scores[-1], self._tokens[-1]
            if self._width > 1:
                scores, places = scores.topk(self._top_k, dim=1)
                self._frontier = scores, tokens.take(self._among_all(places)), places
            else:  # behind a single node they are in order
                assert self.tables is not None
                self._frontier = scores, tokens.reshape(tokens.shape[0], -1), self.tables.in_order
        return self._frontier

    def _among_all(self, places: torch.Tensor) -> torch.Tensor:
        """Places `[B, n]` among the candidates of the last level in each row, as places among those of all rows."""
        if places.shape[0] == 1:
            return places
        size = self._width * self._top_k
        return places + torch.arange(0, places.shape[0] * size, size, device=places.device).unsqueeze(1)

    def _ranked(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ranking is None:
            # A half-precision draft may overflow. The target decides anyway, but NaN would break the order.
            scores = torch.cat(self._scores, dim=1).nan_to_num_(nan=_LOWEST_LOG_PROB, neginf=_LOWEST_LOG_PROB)
            # A log-probability of exactly 0 ties a node with its parent. Stable, since the parent comes first.
            self._ranking = torch.sort(scores, dim=1, descending=True, stable=True)
        return self._ranking

    def _parents_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of the candidates above such candidates; the root is its own parent."""
        assert self.tables is not None
        root = self.tables.in_order.narrow(1, 0, 1)
        above, first = [root, root], 1  # the root's own parent, and that of its candidates
        for places, scores in zip(self._expanded, self._scores[1:], strict=False):
            above.append(places + first)
            first += scores.shape[1]
        # Each of these has K candidates below it, but for the first, the root's parent.
        return torch.cat(above, dim=1).gather(1, self.tables.groups.take(numbers + (self._top_k - 1)))


def rows_of(states: torch.Tensor, index: torch.Tensor | None, count: int) -> torch.Tensor:
    """Of `[B, T, N]`, among all B * T rows, those of `index` `[B * count]`, as `TreeGrowth.descend` gives it:
    `[B, count, N]`. Without one T is 1."""
    if index is None:
        return states.expand(-1, count, -1)
    if states.shape[0] == 1:
        return states.index_select(1, index)
    return states.flatten(0, 1).index_select(0, index).view(states.shape[0], count, -1)


__all__ = ["TreeGrowth", "TreeTables", "rows_of"]
