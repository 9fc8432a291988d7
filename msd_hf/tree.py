"""The candidate tree: settings, growth and re-ranking as pure tensor operations (paper section 3.2; EAGLE-2).

Nodes are numbered in *flat order*: the root is node 0, then level by level, then a branch from its top to its end. So
a parent always has a smaller number than its children, and the accepted path is an increasing list of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .errors import MSDError


if TYPE_CHECKING:
    from transformers import GenerationConfig

DEFAULT_NUM_ASSISTANT_TOKENS = 59
DEFAULT_TREE_DEPTH = 5
DEFAULT_TREE_TOP_K = 10

# `num_assistant_tokens="auto"`, and the bounds that it sets.
AUTO = "auto"
AUTO_NUM_ASSISTANT_TOKENS = 64
AUTO_TREE_DEPTH = 15

# Log-probabilities are clamped here so that sums stay finite: `-inf` would tie with its own children.
MIN_LOG_PROB = -1e4


@dataclass(frozen=True)
class TreeSettings:
    """How large the candidate tree may grow.

    Args:
        num_nodes (`int`): nodes of the tree, the root included. 1 means no drafting at all.
        depth (`int`): expansions after the first; nodes reach at most `depth + 1` levels below the root.
        top_k (`int`): candidates per expanded node, and nodes expanded per level. 1 makes the tree a chain.
        is_auto (`bool`): whether these are bounds, within which each tree gets the size that pays.
        suffix_nodes (`int`): nodes that are added where the text goes on as it did before. 0: none.
    """

    num_nodes: int = DEFAULT_NUM_ASSISTANT_TOKENS
    depth: int = DEFAULT_TREE_DEPTH
    top_k: int = DEFAULT_TREE_TOP_K
    is_auto: bool = False
    suffix_nodes: int = 0

    def __post_init__(self) -> None:
        for name, value, minimum in (
            ("num_assistant_tokens", self.num_nodes, 1),
            ("tree_depth", self.depth, 0),
            ("tree_top_k", self.top_k, 1),
            ("suffix_nodes", self.suffix_nodes, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise MSDError(
                    f"`draft.generation_config.{name}` must be an integer of at least {minimum}, got {value!r}."
                )

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> TreeSettings:
        """Reads `num_assistant_tokens` (which may be `"auto"`), `tree_depth`, `tree_top_k` and `suffix_nodes` of a
        draft's generation config.

        Raises:
            MSDError: when one of them is not an integer in its range.
        """

        def read(name: str, default: int) -> int:
            value = getattr(generation_config, name, None)
            return default if value is None else value

        num_nodes = read("num_assistant_tokens", DEFAULT_NUM_ASSISTANT_TOKENS)
        is_auto = num_nodes == AUTO
        return cls(
            num_nodes=AUTO_NUM_ASSISTANT_TOKENS if is_auto else num_nodes,
            depth=read("tree_depth", AUTO_TREE_DEPTH if is_auto else DEFAULT_TREE_DEPTH),
            top_k=read("tree_top_k", DEFAULT_TREE_TOP_K),
            is_auto=is_auto,
            suffix_nodes=read("suffix_nodes", 0),
        )

    @property
    def num_candidates(self) -> int:
        """Slots that the draft needs for one tree."""
        return self.depth * self.top_k

    def limited_to(self, tokens_left: int | None) -> TreeSettings:
        """The same settings for a tree of which every node may be emitted: near the length limit deeper ones could
        not."""
        if tokens_left is None:
            return self
        num_levels = tokens_left - 1  # the bonus token is the last one
        if num_levels <= 0:
            return replace(self, num_nodes=1, depth=0, suffix_nodes=0)
        depth = min(self.depth, num_levels - 1)
        return replace(self, depth=depth, suffix_nodes=min(self.suffix_nodes, num_levels - depth - 1))


@dataclass
class CandidateTree:
    """A batch of candidate trees.

    Args:
        tokens (`torch.LongTensor` of shape `[B, N]`): token of each node; node 0 is the root, the last emitted token.
        parents (`torch.LongTensor` of shape `[B, N]`): parent node of each node; the root is its own parent.
        depths (`torch.LongTensor` of shape `[B, N]`): levels below the root.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): `[b, i, j]` is true if node j is node i or above it.
        max_depth (`int`): an upper bound of `depths`, known without reading them back from the device.
        scores (`torch.Tensor` of shape `[B, D]`, *optional*): the draft's cumulative log-probability of each node that
            it proposed. These come first.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    max_depth: int
    scores: torch.Tensor | None = None

    @classmethod
    def from_parents(
        cls, tokens: torch.Tensor, parents: torch.Tensor, max_depth: int, scores: torch.Tensor | None = None
    ) -> CandidateTree:
        """Completes a tree of which tokens and parents are known (both `[B, N]`, root first, in flat order)."""
        num_nodes = tokens.shape[1]
        steps = torch.eye(num_nodes, dtype=torch.float32, device=tokens.device).expand(tokens.shape[0], -1, -1).clone()
        steps.scatter_(2, parents.unsqueeze(2), 1.0)
        # [B, N, N]; squaring a reachability matrix doubles the number of levels that it spans.
        for _ in range(math.ceil(math.log2(max(max_depth, 1)))):
            steps = (steps @ steps).clamp_(max=1.0)
        ancestors = steps > 0.5
        return cls(tokens, parents, ancestors.sum(-1) - 1, ancestors, max_depth, scores)

    @classmethod
    def chain(cls, tokens: torch.Tensor) -> CandidateTree:
        """A chain of `tokens` (`[B, N]`) in each row."""
        num_nodes = tokens.shape[1]
        parents = (torch.arange(num_nodes, device=tokens.device) - 1).clamp(min=0)
        return cls.from_parents(tokens, parents.expand_as(tokens), max_depth=num_nodes - 1)

    def with_chain(self, rows: Sequence[int], token: int) -> CandidateTree:
        """The same trees but for some rows, which become a chain of one token below their root."""
        num_nodes = self.tokens.shape[1]
        index = torch.tensor(rows, device=self.tokens.device)
        numbers = torch.arange(num_nodes, device=self.tokens.device)
        tokens, parents, depths, ancestors = (
            part.index_copy(0, index, chain.expand(len(rows), *part.shape[1:]))
            for part, chain in (
                (self.tokens, torch.full_like(numbers, token)),
                (self.parents, (numbers - 1).clamp(min=0)),
                (self.depths, numbers),
                (self.ancestors, torch.ones_like(self.ancestors[0]).tril()),
            )
        )
        tokens[:, 0] = self.tokens[:, 0]
        return CandidateTree(tokens, parents, depths, ancestors, max(self.max_depth, num_nodes - 1))

    def with_branch(self, tokens: torch.Tensor, num_nodes: int) -> CandidateTree:
        """
        The same trees with more nodes, so that each has a path of tokens as far down as these reach.

        Args:
            tokens (`torch.LongTensor` of shape `[B, P]`): below the root; P is at least `max_depth + num_nodes`.
            num_nodes (`int`): nodes that are added behind those that carry the path already.
        """
        num_held = self.tokens.shape[1]
        carries = self.tokens == tokens.gather(1, (self.depths - 1).clamp(min=0))
        held = self.path(carries)  # [B, N]
        depth = held.sum(1, keepdim=True) - 1  # [B, 1]
        numbers = torch.arange(num_held + num_nodes, device=self.tokens.device)
        # Flat order makes the last node of a path the one with the largest number.
        last = torch.where(held, numbers[:num_held], 0).amax(1, keepdim=True)
        below = depth + numbers[:num_nodes]  # [B, M]: their places in `tokens`
        above = self.ancestors.gather(1, last.unsqueeze(2).expand(-1, -1, num_held)).expand(-1, num_nodes, -1)
        own = torch.ones_like(self.ancestors[:, :1, :1]).expand(-1, num_nodes, num_nodes).tril()
        ancestors = torch.cat([functional.pad(self.ancestors, (0, num_nodes)), torch.cat([above, own], dim=2)], dim=1)
        return CandidateTree(
            torch.cat([self.tokens, tokens.gather(1, below)], dim=1),
            torch.cat([self.parents, last, numbers[num_held:-1].expand(len(last), -1)], dim=1),
            torch.cat([self.depths, below + 1], dim=1),
            ancestors,
            self.max_depth + num_nodes,
            self.scores,
        )

    def path(self, matches: torch.Tensor) -> torch.Tensor:
        """Of nodes that match (`[B, N]`, at most one of any siblings), those that are connected to the root by such
        nodes, and the root: one path, `[B, N]`."""
        matches = matches.clone()
        matches[:, 0] = True
        return (matches.unsqueeze(1) | ~self.ancestors).all(-1)

    def padded(self, num_nodes: int) -> CandidateTree:
        """The same trees with nodes added that are of no use: they see themselves alone, and nobody sees them."""
        count = num_nodes - self.tokens.shape[1]
        tokens, parents, depths = (
            functional.pad(part, (0, count)) for part in (self.tokens, self.parents, self.depths)
        )
        ancestors = functional.pad(self.ancestors, (0, count, 0, count))
        ancestors.diagonal(dim1=1, dim2=2)[:, num_nodes - count :] = True
        return CandidateTree(tokens, parents, depths, ancestors, self.max_depth)

    def to(self, device: torch.device) -> CandidateTree:
        """The tree on another device."""
        return CandidateTree(
            tokens=self.tokens.to(device),
            parents=self.parents.to(device),
            depths=self.depths.to(device),
            ancestors=self.ancestors.to(device),
            max_depth=self.max_depth,
            scores=self.scores,
        )


class TreeGrowth:
    """Grows a tree level by level: each of the `top_k` frontier nodes proposes `top_k` tokens, the `top_k` best of
    these by cumulative log-probability are the next frontier, and in the end the best of all are kept.

    Args:
        root (`torch.LongTensor` of shape `[B]`): the last emitted token.
        settings (`TreeSettings`): the size of the tree.
    """

    def __init__(self, root: torch.Tensor, settings: TreeSettings):
        self.root = root
        self.settings = settings
        self._tokens: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._num_candidates = 0
        self._ranking: tuple[torch.Tensor, ...] | None = None  # scores and numbers of the best candidates
        # Of the frontier: index among all candidates, cumulative log-probability, both [B, K]; ancestor mask among
        # the nodes that were expanded so far, [B, K, expanded].
        self._frontier = root.new_full((root.shape[0], 1), -1)
        self._frontier_scores: torch.Tensor | None = None
        self._ancestors: torch.Tensor | None = None
        self._constants: _Constants | None = None

    @property
    def frontier_ancestors(self) -> torch.Tensor:
        """`[B, K, expanded]`: of the nodes expanded so far, each frontier node's ancestors and itself."""
        if self._ancestors is None:
            raise MSDError("The root has not been expanded yet.")
        return self._ancestors

    @property
    def frontier_scores(self) -> torch.Tensor:
        """Cumulative log-probabilities of the frontier, `[B, K]`."""
        if self._frontier_scores is None:
            raise MSDError("The root has not been expanded yet.")
        return self._frontier_scores

    @property
    def num_levels(self) -> int:
        """Levels below the root so far."""
        return len(self._tokens)

    @property
    def num_nodes(self) -> int:
        """Nodes that there would be now, the root included."""
        return 1 + min(self.settings.num_nodes - 1, self._num_candidates)

    def best_scores(self, count: int) -> torch.Tensor:
        """The cumulative log-probabilities of the best candidates of all levels, `[B, count]`, best first."""
        return self._best(count)[0]

    def expand(self, log_probs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the candidates of one level and picks the next frontier.

        Args:
            log_probs (`torch.Tensor` of shape `[B, F, K]`): the K best log-probabilities at each of the F frontier
                nodes (F is 1 at the root, K after it).
            tokens (`torch.LongTensor` of shape `[B, F, K]`): their tokens.

        Returns:
            The tokens of the next frontier (`[B, K]`), and for each the frontier node above it (`[B, K]`).
        """
        batch_size, _, top_k = log_probs.shape
        if self._constants is None:
            self._constants = _Constants(log_probs, top_k)
        constants = self._constants
        # A half-precision draft may overflow; the target decides anyway, but NaN would break the order.
        scores = torch.fmax(log_probs, constants.lowest)
        if self._frontier_scores is not None:
            above = self._frontier_scores.unsqueeze(2)  # [B, F, 1]
            # A log-probability of exactly 0 would tie a node with its parent, and top-k could keep the child alone.
            scores = torch.minimum(scores + above, torch.nextafter(above, constants.minus_infinity))
        flat_scores, flat_tokens = scores.flatten(1), tokens.flatten(1)  # [B, F * K]
        self._tokens.append(flat_tokens)
        self._scores.append(flat_scores)
        self._parents.append(self._frontier.unsqueeze(2).expand(-1, -1, top_k).flatten(1))

        if self._frontier_scores is None:
            picked = torch.arange(top_k, device=tokens.device).expand(batch_size, -1)
            self._frontier_scores = flat_scores
        else:
            self._frontier_scores, picked = flat_scores.topk(top_k, dim=1)
        above_index = picked // top_k  # [B, K]
        self._frontier = picked + self._num_candidates
        self._num_candidates += flat_scores.shape[1]
        self._ranking = None

        own = constants.eye.expand(batch_size, -1, -1)
        if self._ancestors is not None:
            inherited = self._ancestors.gather(1, above_index.unsqueeze(2).expand(-1, -1, self._ancestors.shape[2]))
            own = torch.cat([inherited, own], dim=2)
        self._ancestors = own
        return flat_tokens.gather(1, picked), above_index

    def finish(self, num_nodes: int | None = None) -> CandidateTree:
        """Keeps the best candidates of all levels, in flat order: as many as set, or fewer (`num_nodes`)."""
        root = self.root.unsqueeze(1)
        num_kept = (self.num_nodes if num_nodes is None else min(num_nodes, self.num_nodes)) - 1
        if num_kept == 0:
            return CandidateTree.from_parents(root, torch.zeros_like(root), max_depth=0)
        tokens, parents = (torch.cat(part, dim=1) for part in (self._tokens, self._parents))
        kept, order = self._best(num_kept)[1].sort(dim=1)  # [B, N - 1]
        scores = self._best(num_kept)[0].gather(1, order)
        kept_parents = parents.gather(1, kept)
        # The parent of a kept candidate is kept too, so its place among the kept is its node number less one; the
        # root (-1) sorts before all of them.
        parent_nodes = torch.where(kept_parents < 0, 0, torch.searchsorted(kept, kept_parents) + 1)
        return CandidateTree.from_parents(
            torch.cat([root, tokens.gather(1, kept)], dim=1),
            torch.cat([torch.zeros_like(root), parent_nodes], dim=1),
            max_depth=len(self._tokens),
            scores=torch.cat([torch.zeros_like(scores[:, :1]), scores], dim=1),
        )

    def _best(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ranking is None or self._ranking[0].shape[1] < count:
            self._ranking = tuple(torch.cat(self._scores, dim=1).topk(count, dim=1))
        return self._ranking[0][:, :count], self._ranking[1][:, :count]


class _Constants:
    """What every level needs, made once for a tree."""

    def __init__(self, log_probs: torch.Tensor, top_k: int):
        self.lowest = log_probs.new_full((), MIN_LOG_PROB)
        self.minus_infinity = log_probs.new_full((), -math.inf)
        self.eye = torch.eye(top_k, dtype=torch.bool, device=log_probs.device)


__all__ = ["CandidateTree", "TreeGrowth", "TreeSettings"]
