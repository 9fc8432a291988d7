"""Drafting with growing shapes: each tree as deep and as wide as the policy wants it (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..attention.masks import tree_attention_mask
from ..draft.interface import Draft
from ..observer import phase
from ..target.adapter import TargetAdapter, TargetPrefill
from ..tree.candidate import CandidateTree
from ..tree.growth import TreeGrowth, TreeTables, rows_of
from ..tree.policy import TreePolicy
from ..tree.settings import TreeSettings
from .drafter import Drafter
from .levels import grow_levels
from .memory import ChatMemory


class GrowingDrafter(Drafter):
    """
    Drafts trees whose size differs from round to round, as a policy chooses it within the limits of the round.

    Args:
        draft, target, max_slots, max_visual_rows: arguments of [`Drafter`].
        policy (`TreePolicy`, *optional*): chooses width, depth and number of nodes. By default trees fill the limits.
        best_path_first (`bool`): whether [`CandidateTree.with_best_path_first`] renumbers the nodes.
    """

    def __init__(
        self,
        draft: Draft,
        target: TargetAdapter,
        max_slots: int | None = None,
        policy: TreePolicy | None = None,
        best_path_first: bool = False,
        max_visual_rows: int | None = None,
    ):
        super().__init__(draft, target, max_slots, max_visual_rows)
        self.policy = policy
        self.best_path_first = best_path_first
        self._tables: TreeTables | None = None
        self._last_state: torch.Tensor  # [B, 1, H]: the first level of the next tree is drafted from it

    def prefill(self, prefill: TargetPrefill, tokens: torch.Tensor, past: ChatMemory | None = None) -> None:
        prompt = self._feed_prompt(prefill, tokens, past)
        self._last_state = prompt.last_state
        # A copy, because a view would keep the states of the whole prompt alive.
        self.last_hidden_state = prompt.hidden_states[:, -1:].clone()

    @torch.inference_mode()  # faster, as in `propose`
    def feed_pending(self) -> None:
        self._feed_pending()

    def _feed_pending(self) -> None:
        pending, self._pending = self._pending, []
        if len(pending) > 1 and all(min(counts) == tokens.shape[1] for tokens, _, counts in pending):
            tokens = torch.cat([tokens for tokens, _, _ in pending], dim=1)
            hidden_states = torch.cat([states for _, states, _ in pending], dim=1)
            pending = [(tokens, hidden_states, [tokens.shape[1]] * tokens.shape[0])]
        for tokens, hidden_states, counts in pending:
            self._last_state = self._feed(tokens, hidden_states, counts)

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        self._last_state = self._last_state[list(places)]

    @torch.inference_mode()  # many small operations take an eighth less time in it
    def propose(self, roots: torch.Tensor, limits: TreeSettings) -> CandidateTree:
        policy = self.policy or TreePolicy(limits)
        growth = TreeGrowth(roots, limits, self._tables)
        self._feed_pending()
        self._slots.begin()
        grow_levels(growth, self._last_state, policy, self._head.top_k, self._level_forward(growth, limits))
        self._tables = growth.tables
        with phase("cache"):
            self._slots.abort()  # the tree's slots hold the draft's own states
        tree = growth.finish(policy.num_nodes(growth))
        if self.best_path_first and limits.top_k > 1 and tree.max_depth:
            return tree.with_best_path_first()
        return tree

    def _level_forward(self, growth: TreeGrowth, limits: TreeSettings) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Makes the function with which `grow_levels` runs the draft over the frontier of a growth."""
        context, batch_size = self._slots.context, growth.root.shape[0]
        positions = self._positions_ahead(limits.depth)
        # Which slots each node of the frontier sees, [B, F, S + nodes expanded so far]: those of its parent and its
        # own. `None` while every node sees everything, as on a path.
        mask: torch.Tensor | None = None
        if context.hides_slots:
            no_nodes = torch.ones(batch_size, 1, 0, dtype=torch.bool, device=self.device)
            mask = tree_attention_mask(no_nodes, context, self._dtype)[:, 0]
        own = self._own_mask("level", batch_size, limits.top_k)
        num_slots, last_position = context.num_slots, self._last_position
        # Of all levels at once, because reading them from a table takes as long as four smaller operations.
        cos_sin: tuple[torch.Tensor, ...] = ()
        if self._drafting_step.is_plain and limits.depth:
            cos_sin = self._drafting_step.rotations(positions, last_position + limits.depth, self._last_state)

        def forward(level: int, states: torch.Tensor) -> torch.Tensor:
            nonlocal mask, own
            tokens, above = growth.frontier_tokens, growth.above
            width = tokens.shape[1]  # a small vocabulary has fewer candidates than the policy asks for
            if mask is None and width > 1:
                mask = states.new_zeros(batch_size, 1, num_slots + level)
            seen = None
            if mask is not None:
                states, mask = rows_of(above, width, states, mask)
                if own.shape[1] != width:
                    own = self._own_mask("level", batch_size, width)
                mask = torch.cat([mask, own], dim=2)
                seen = mask.unsqueeze(1)
            position_ids, rotations = positions.narrow(1, level, 1), None
            if cos_sin:
                rotations = cos_sin[0].narrow(2, level, 1), cos_sin[1].narrow(2, level, 1)
            return self._step(tokens, states, position_ids, seen, last_position + level + 1, rotations)

        return forward


__all__ = ["GrowingDrafter"]
