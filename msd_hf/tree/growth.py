"""Growth and re-ranking of candidate trees as pure tensor operations (paper section 3.2; EAGLE-2).

The *index* of a candidate counts all candidates of a tree, level by level; the root has index 0. The *place* of a
candidate counts the candidates of its level only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .candidate import CandidateTree
from .settings import TreeSettings


_LOWEST_LOG_PROB = -1e30


class TreeTables(NamedTuple):
    """Constant tensors with which [`TreeGrowth`] grows all trees of one size. B rows, K candidates a node."""

    groups: torch.Tensor  # [n]: i // K for each i
    in_order: torch.Tensor  # [B, K]: 0, 1, ... in each row
    root_scores: torch.Tensor  # [B, 1]: zeros

    @classmethod
    def like(cls, log_probs: torch.Tensor, num_entries: int) -> TreeTables:
        """Tables for trees whose levels have log-probabilities like `log_probs` `[B, F, K]`. `groups` gets at least
        `num_entries` entries."""
        batch_size, _, top_k = log_probs.shape
        counting = torch.arange(max(num_entries, top_k), device=log_probs.device)
        return cls(counting // top_k, counting[:top_k].expand(batch_size, -1), log_probs.new_zeros(batch_size, 1))

    def fits(self, log_probs: torch.Tensor, num_entries: int) -> bool:
        """Whether the tables can be used in place of the ones that `like` would make."""
        batch_size, _, top_k = log_probs.shape
        return (
            self.in_order.shape == (batch_size, top_k)
            and self.groups.shape[0] >= num_entries
            and self.root_scores.dtype == log_probs.dtype
        )


class TreeGrowth:
    """Grows a tree level by level. Each node of the frontier proposes `top_k` candidates. The `top_k` best candidates
    of a level, by cumulative log-probability, become the next frontier. In the end the best candidates of all levels
    become the tree.

    Args:
        root (`torch.LongTensor` of shape `[B]`): the last emitted token.
        settings (`TreeSettings`): bounds of the size of the tree.
        tables (`TreeTables`, *optional*): tables of an earlier tree, used again if they fit.

    Attributes:
        frontier_scores (`torch.Tensor` of shape `[B, F]`): cumulative log-probabilities of the frontier, best first;
            NaN where the draft overflowed. Set by `expand`, except for the deepest level, which is never a frontier.
        frontier_tokens (`torch.LongTensor` of shape `[B, F]`): tokens of the frontier.
        above (`torch.LongTensor` of shape `[B * F]`, *optional*): for each node of the frontier, the row of its parent
            among the rows of the previous frontier, counted through the whole batch; `None` if that frontier was one
            node per tree.
    """

    # A Python call costs as much as a small tensor operation, so a level is grown in one call.
    frontier_scores: torch.Tensor
    frontier_tokens: torch.Tensor
    above: torch.Tensor | None

    def __init__(self, root: torch.Tensor, settings: TreeSettings, tables: TreeTables | None = None):
        self.root = root
        self.settings = settings
        self.tables = tables
        self._tokens: list[torch.Tensor] = []  # [B, F, K] for each level below the root
        self._scores: list[torch.Tensor] = []  # cumulative log-probabilities: [B, 1], then [B, F * K] for each level
        self._num_candidates = 1
        self._places: torch.Tensor  # [B, F]: the places of the frontier
        self._expanded_places: list[torch.Tensor] = []  # [B, F] for each expanded level below the root
        self._ranking: tuple[torch.Tensor, torch.Tensor] | None = None  # scores and indices, best first, [B, C] each

    @property
    def num_nodes(self) -> int:
        """The number of nodes of the tree if the growth ended now, the root included."""
        return min(self.settings.num_nodes, self._num_candidates)

    def best_scores(self, num_candidates: int) -> torch.Tensor:
        """Cumulative log-probabilities of the best candidates below the root, `[B, num_candidates]`, best first."""
        return self._ranked()[0][:, 1 : num_candidates + 1]

    def expand(self, log_probs: torch.Tensor, tokens: torch.Tensor) -> None:
        """Adds the candidates of one level.

        Args:
            log_probs (`torch.Tensor` of shape `[B, F, K]`): the K best log-probabilities, best first, at each of the F
                nodes of the frontier. F is 1 at the root; further down it is K, or the width given to `narrow`.
            tokens (`torch.LongTensor` of shape `[B, F, K]`): the tokens with these log-probabilities.
        """
        batch_size, width, top_k = log_probs.shape
        if self._scores:
            self._expanded_places.append(self._places)
            log_probs = log_probs + self.frontier_scores.unsqueeze(2)
        else:
            # `groups` is read at the places of a level, counted through the batch, and at all indices plus K - 1.
            num_entries = max(batch_size, self.settings.depth + 2) * top_k * max(self.settings.top_k, top_k)
            if self.tables is None or not self.tables.fits(log_probs, num_entries):
                self.tables = TreeTables.like(log_probs, num_entries)
            self._scores.append(self.tables.root_scores)
        scores = log_probs.view(batch_size, -1)
        self._tokens.append(tokens)
        self._scores.append(scores)
        self._num_candidates += width * top_k
        self._ranking = None
        if len(self._expanded_places) == self.settings.depth:
            return
        assert self.tables is not None
        if width == 1:  # the candidates of a single node are sorted already
            self.frontier_scores, self.frontier_tokens = scores, tokens.view(batch_size, -1)
            self._places, self.above = self.tables.in_order, None
            return
        self.frontier_scores, self._places = scores, places = scores.topk(top_k)
        if batch_size > 1:  # count the places through the whole batch
            places = places + torch.arange(0, tokens.numel(), width * top_k, device=places.device).unsqueeze(1)
        self.frontier_tokens = tokens.take(places)
        self.above = self.tables.groups.take(places).view(-1)

    def narrow(self, width: int) -> None:
        """Reduces the frontier to its `width` best nodes."""
        batch_size = self._places.shape[0]
        self.frontier_scores = self.frontier_scores.narrow(1, 0, width)
        self.frontier_tokens = self.frontier_tokens.narrow(1, 0, width)
        self._places = self._places.narrow(1, 0, width)
        if self.above is not None:
            self.above = self.above.view(batch_size, -1)[:, :width].reshape(-1)

    def finish(self, num_nodes: int | None = None) -> CandidateTree:
        """The tree of the best candidates of all levels. It has `num_nodes` nodes, or fewer if the settings allow no
        more; by default as many as the settings allow."""
        num_kept = self.num_nodes if num_nodes is None else min(num_nodes, self.num_nodes)
        if num_kept == 1:
            return CandidateTree.bare(self.root)
        scores, indices = self._ranked()
        # Sorted indices are flat order. The parent of a kept candidate is kept too: it never ranks behind its child.
        kept, order = indices.narrow(1, 0, num_kept).sort(dim=1)  # [B, N]
        parents = torch.searchsorted(kept, self._parents_of(kept))
        batch_size = kept.shape[0]
        tokens = torch.cat([tokens.reshape(batch_size, -1) for tokens in (self.root, *self._tokens)], dim=1)
        return CandidateTree.from_parents(
            tokens.gather(1, kept), parents, max_depth=len(self._tokens), scores=scores.gather(1, order)
        )

    def _ranked(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ranking is None:
            # A half-precision draft may overflow. A wrong score is harmless, as the target verifies the tree, but NaN
            # would break the order.
            scores = torch.cat(self._scores, dim=1).nan_to_num_(nan=_LOWEST_LOG_PROB, neginf=_LOWEST_LOG_PROB)
            # A log-probability of exactly 0 gives a node the score of its parent. A stable sort puts the parent first.
            self._ranking = torch.sort(scores, dim=1, descending=True, stable=True)
        return self._ranking

    def _parents_of(self, indices: torch.Tensor) -> torch.Tensor:
        """The index of the parent of each given candidate, `[B, N]`; the root is its own parent."""
        assert self.tables is not None
        root = self.tables.in_order.narrow(1, 0, 1)
        # The indices of the parents: of the root, then of each group of K siblings.
        group_parents, first_index = [root, root], 1
        for places, scores in zip(self._expanded_places, self._scores[1:], strict=False):
            group_parents.append(places + first_index)
            first_index += scores.shape[1]
        # The root takes up a whole group, so all indices move up by K - 1.
        top_k = self.tables.in_order.shape[1]
        return torch.cat(group_parents, dim=1).gather(1, self.tables.groups.take(indices + (top_k - 1)))


def rows_of(
    index: torch.Tensor | None, width: int, states: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Selects rows of `states` and `mask`, for each node the row of its parent.

    Args:
        index (`torch.LongTensor` of shape `[B * width]`, *optional*): rows, counted through the whole batch, see
            `TreeGrowth.above`. `None`: T is 1, and its row is repeated.
        width (`int`): nodes of each tree.
        states, mask (`torch.Tensor` of shape `[B, T, N]`): rows of the T parents; states and mask differ in N.

    Returns:
        Both with shape `[B, width, N]`.
    """
    if index is None:
        return states.expand(-1, width, -1), mask.expand(-1, width, -1)
    batch_size = states.shape[0]
    if batch_size == 1:
        return states.index_select(1, index), mask.index_select(1, index)
    states, mask = states.flatten(0, 1).index_select(0, index), mask.flatten(0, 1).index_select(0, index)
    return states.view(batch_size, width, -1), mask.view(batch_size, width, -1)


__all__ = ["TreeGrowth", "TreeTables", "rows_of"]
