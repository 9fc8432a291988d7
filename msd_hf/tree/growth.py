"""Growth and re-ranking of candidate trees as pure tensor operations (paper section 3.2; EAGLE-2)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .candidate import CandidateTree
from .settings import TreeSettings


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

    Attributes:
        frontier_scores (`torch.Tensor` of shape `[B, F]`): cumulative log-probabilities of the frontier, best first;
            NaN where the draft overflowed. From the first `expand` on, up to the deepest level that is expanded.
        frontier_tokens (`torch.LongTensor` of shape `[B, F]`): its tokens.
        above (`torch.LongTensor` of shape `[B * F]`, *optional*): for each of its nodes the row of the node above it
            among the B * F rows of the frontier before; `None` if that was one node.
    """

    # Behind forwards of a large model each call of a function costs as much as a small operation: a level is one call.
    frontier_scores: torch.Tensor
    frontier_tokens: torch.Tensor
    above: torch.Tensor | None

    def __init__(self, root: torch.Tensor, settings: TreeSettings, tables: TreeTables | None = None):
        self.root = root
        self.settings = settings
        self.tables = tables
        # Of each level: tokens [B, F, K], and cumulative log-probabilities [B, F * K].
        self._tokens: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._num_candidates = 1
        self._places: torch.Tensor  # of the frontier among the candidates of its level, [B, F]
        self._expanded: list[torch.Tensor] = []  # these places, of the levels that were expanded
        self._ranking: tuple[torch.Tensor, torch.Tensor] | None = None  # scores and numbers of all, best first

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
                nodes of the frontier (F is 1 at the root, after it K or what `narrow` was told).
            tokens (`torch.LongTensor` of shape `[B, F, K]`): their tokens.
        """
        batch_size, width, top_k = log_probs.shape
        if self._scores:
            self._expanded.append(self._places)
            log_probs = log_probs + self.frontier_scores.unsqueeze(2)
        else:
            # Places among the candidates of a level in all rows, and numbers of all candidates with K for the root.
            count = max(batch_size, self.settings.depth + 2) * top_k * max(self.settings.top_k, top_k)
            if self.tables is None or not self.tables.fits(log_probs, count):
                self.tables = TreeTables.like(log_probs, count)
            self._scores.append(self.tables.root_scores)
        scores = log_probs.view(batch_size, -1)
        self._tokens.append(tokens)
        self._scores.append(scores)
        self._num_candidates += width * top_k
        self._ranking = None
        if len(self._expanded) == self.settings.depth:
            return
        assert self.tables is not None
        if width == 1:  # behind a single node they are in order
            self.frontier_scores, self.frontier_tokens = scores, tokens.view(batch_size, -1)
            self._places, self.above = self.tables.in_order, None
            return
        self.frontier_scores, self._places = scores, places = scores.topk(top_k)
        if batch_size > 1:  # among the candidates of all rows
            places = places + torch.arange(0, tokens.numel(), width * top_k, device=places.device).unsqueeze(1)
        self.frontier_tokens = tokens.take(places)
        self.above = self.tables.groups.take(places).view(-1)

    def narrow(self, width: int) -> None:
        """Keeps the `width` best nodes of the frontier."""
        batch_size = self._places.shape[0]
        self.frontier_scores = self.frontier_scores[:, :width]
        self.frontier_tokens = self.frontier_tokens[:, :width]
        self._places = self._places[:, :width]
        if self.above is not None:
            self.above = self.above.view(batch_size, -1)[:, :width].reshape(-1)

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
        top_k = self.tables.in_order.shape[1]
        return torch.cat(above, dim=1).gather(1, self.tables.groups.take(numbers + (top_k - 1)))


def rows_of(
    index: torch.Tensor | None, count: int, states: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both `[B, T, N]`, among all B * T rows, those of `index` `[B * count]`, as `TreeGrowth.above` is:
    `[B, count, N]`. Without one T is 1."""
    if index is None:
        return states.expand(-1, count, -1), mask.expand(-1, count, -1)
    batch_size = states.shape[0]
    if batch_size == 1:
        return states.index_select(1, index), mask.index_select(1, index)
    states, mask = states.flatten(0, 1).index_select(0, index), mask.flatten(0, 1).index_select(0, index)
    return states.view(batch_size, count, -1), mask.view(batch_size, count, -1)


__all__ = ["TreeGrowth", "TreeTables", "rows_of"]
