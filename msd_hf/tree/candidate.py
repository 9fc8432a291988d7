"""The candidate tree.

Nodes are numbered in *flat order*: the root is node 0, the drafted nodes follow level by level, and an added branch
follows from top to bottom. The draft's most likely path may be moved before all other nodes. A parent always has a
smaller number than its children, so an accepted path is an increasing list of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional


@dataclass
class CandidateTree:
    """A batch of candidate trees.

    Args:
        tokens (`torch.LongTensor` of shape `[B, N]`): token of each node; node 0 is the root, the last emitted token.
        parents (`torch.LongTensor` of shape `[B, N]`): parent node of each node; the root is its own parent.
        depths (`torch.LongTensor` of shape `[B, N]`): how many levels each node is below the root.
        ancestors (`torch.BoolTensor` of shape `[B, N, N]`): `[b, i, j]` is true if node j is node i or its ancestor.
        max_depth (`int`): an upper bound of `depths`, known without a read-back from the device.
        scores (`torch.Tensor` of shape `[B, D]`, *optional*): the draft's cumulative log-probability of the first D
            nodes. The draft has not proposed the other nodes.
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
        """Makes trees from the tokens and parents of their nodes (both `[B, N]`, root first, in flat order)."""
        above = [parents]  # the ancestors 1, 2, ... levels above each node; the root is its own
        for _ in range(max_depth - 1):
            above.append(parents.gather(1, above[-1]))
        ancestors = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool, device=tokens.device)
        ancestors.scatter_(2, torch.stack(above, dim=2), True)
        ancestors.diagonal(dim1=1, dim2=2).fill_(True)
        return cls(tokens, parents, ancestors.sum(-1) - 1, ancestors, max_depth, scores)

    @classmethod
    def bare(cls, roots: torch.Tensor) -> CandidateTree:
        """Trees that consist of their roots (`[B]`) alone."""
        tokens = roots.unsqueeze(1)
        zeros = torch.zeros_like(tokens)
        return cls(tokens, zeros, zeros, torch.ones_like(tokens, dtype=torch.bool).unsqueeze(2), max_depth=0)

    @classmethod
    def chain(cls, tokens: torch.Tensor) -> CandidateTree:
        """Trees that are chains of `tokens` (`[B, N]`)."""
        num_nodes = tokens.shape[1]
        parents = (torch.arange(num_nodes, device=tokens.device) - 1).clamp(min=0)
        return cls.from_parents(tokens, parents.expand_as(tokens), max_depth=num_nodes - 1)

    def with_chain(self, rows: Sequence[int], token: int) -> CandidateTree:
        """Replaces the trees of the given rows by chains of as many nodes, which repeat one token below the root."""
        num_nodes = self.tokens.shape[1]
        index = torch.tensor(rows, device=self.tokens.device)
        nodes = torch.arange(num_nodes, device=self.tokens.device)
        tokens, parents, depths, ancestors = (
            part.index_copy(0, index, chain.expand(len(rows), *part.shape[1:]))
            for part, chain in (
                (self.tokens, torch.full_like(nodes, token)),
                (self.parents, (nodes - 1).clamp(min=0)),
                (self.depths, nodes),
                (self.ancestors, torch.ones_like(self.ancestors[0]).tril()),
            )
        )
        tokens[:, 0] = self.tokens[:, 0]
        return CandidateTree(tokens, parents, depths, ancestors, max(self.max_depth, num_nodes - 1))

    def with_branch(self, tokens: torch.Tensor, num_nodes: int) -> CandidateTree:
        """
        Adds a path of the given tokens below the root of each tree. Existing nodes that match the start of the path
        are reused, and the new nodes continue from the last reused node.

        Args:
            tokens (`torch.LongTensor` of shape `[B, P]`): tokens of the path; P is at least `max_depth + num_nodes`.
            num_nodes (`int`): nodes to add to each tree, M.
        """
        num_old = self.tokens.shape[1]
        matches = self.tokens == tokens.gather(1, (self.depths - 1).clamp(min=0))
        reused = self.path(matches)  # [B, N]
        depth = reused.sum(1, keepdim=True) - 1  # [B, 1]
        nodes = torch.arange(num_old + num_nodes, device=self.tokens.device)
        # In flat order the last node of a path has the largest number.
        last = torch.where(reused, nodes[:num_old], 0).amax(1, keepdim=True)
        path_index = depth + nodes[:num_nodes]  # [B, M]: which of `tokens` each new node carries
        above = self.ancestors.gather(1, last.unsqueeze(2).expand(-1, -1, num_old)).expand(-1, num_nodes, -1)
        own = torch.ones_like(self.ancestors[:, :1, :1]).expand(-1, num_nodes, num_nodes).tril()
        ancestors = torch.cat([functional.pad(self.ancestors, (0, num_nodes)), torch.cat([above, own], dim=2)], dim=1)
        return CandidateTree(
            torch.cat([self.tokens, tokens.gather(1, path_index)], dim=1),
            torch.cat([self.parents, last, nodes[num_old:-1].expand(len(last), -1)], dim=1),
            torch.cat([self.depths, path_index + 1], dim=1),
            ancestors,
            self.max_depth + num_nodes,
            self.scores,
        )

    def with_best_path_first(self) -> CandidateTree:
        """Renumbers the nodes so that the path to the best of the deepest nodes comes first. If that path is accepted,
        its slots need not be moved."""
        assert self.scores is not None
        best = (self.depths + self.scores.exp()).argmax(1)  # depth decides, then probability, which is at most 1
        on_best_path = self.ancestors.gather(1, best.view(-1, 1, 1).expand(-1, -1, self.ancestors.shape[2])).squeeze(1)
        order = on_best_path.sort(dim=1, descending=True, stable=True).indices  # [B, N]: old number of each new node
        new_numbers = order.argsort(dim=1)  # [B, N]: new number of each old node
        square = order.unsqueeze(2).expand_as(self.ancestors)
        return CandidateTree(
            self.tokens.gather(1, order),
            new_numbers.gather(1, self.parents.gather(1, order)),
            self.depths.gather(1, order),
            self.ancestors.gather(1, square).gather(2, square.transpose(1, 2)),
            self.max_depth,
            self.scores.gather(1, order),
        )

    def best_path(self) -> CandidateTree:
        """The path to the best of the deepest nodes alone, of a single tree."""
        assert len(self.tokens) == 1 and self.scores is not None
        return CandidateTree.chain(self.with_best_path_first().tokens[:, : int(self.depths.max()) + 1])

    def with_emittable_depths(self, tokens_left: Sequence[int] | None) -> CandidateTree:
        """
        Limits `depths` to the depth of the deepest node that can still be emitted, because the target may have no
        positions for deeper nodes.

        Args:
            tokens_left (`Sequence[int]`, *optional*): how many tokens each row may still emit, the bonus token
                included; `None`: no limit.
        """
        if tokens_left is None or min(tokens_left) > self.max_depth:
            return self
        return self.with_depths_below(torch.tensor(tokens_left, device=self.depths.device))

    def with_depths_below(self, tokens_left: torch.Tensor) -> CandidateTree:
        """Does what `with_emittable_depths` does, for a tensor `tokens_left` `[B]` that is already on the device.
        Nothing is read back."""
        return replace(self, depths=self.depths.minimum((tokens_left - 1).clamp(min=0).unsqueeze(1)))

    def path(self, matches: torch.Tensor) -> torch.Tensor:
        """The longest path of matching nodes from the root, `[B, N]`: true at its nodes. `matches` (`[B, N]`) is true
        for at most one node among siblings. The root always counts as a match."""
        matches = matches.clone()
        matches[:, 0] = True
        return (matches.unsqueeze(1) | ~self.ancestors).all(-1)

    def padded(self, num_nodes: int) -> CandidateTree:
        """Pads each tree to `num_nodes` nodes with inert ones: each sees only itself, and no other node sees it."""
        num_added = num_nodes - self.tokens.shape[1]
        if num_added == 0:
            return self
        tokens, parents, depths = (
            functional.pad(part, (0, num_added)) for part in (self.tokens, self.parents, self.depths)
        )
        ancestors = functional.pad(self.ancestors, (0, num_added, 0, num_added))
        ancestors.diagonal(dim1=1, dim2=2)[:, num_nodes - num_added :] = True
        return CandidateTree(tokens, parents, depths, ancestors, self.max_depth)

    def clone(self) -> CandidateTree:
        """Copies the tree with all its tensors."""
        return self._changed(torch.clone)

    def to(self, device: torch.device) -> CandidateTree:
        """Moves the tree to a device."""
        if self.tokens.device == device:
            return self
        return self._changed(lambda part: part.to(device))

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CandidateTree:
        return CandidateTree(
            tokens=change(self.tokens),
            parents=change(self.parents),
            depths=change(self.depths),
            ancestors=change(self.ancestors),
            max_depth=self.max_depth,
            scores=None if self.scores is None else change(self.scores),
        )


__all__ = ["CandidateTree"]
