"""Drafting: the draft model grows a candidate tree from the target's last hidden states (paper section 3.2)."""

from __future__ import annotations

import torch
from transformers import Cache

from .cache import InPlaceLayer, truncate
from .modeling_msd import MSDDraftModel
from .phases import phase
from .targets import TargetAdapter, TargetPrefill
from .tree import CandidateTree, TreeGrowth, TreeSettings, tree_attention_mask


class MSDCandidateGenerator:
    """
    Proposes candidate trees and keeps the draft's KV cache.

    The cache holds one slot per pair (token at position j + 1, target hidden state at position j). While a tree grows,
    the draft's own output stands in for hidden states that the target has not computed yet; those slots are dropped
    and the accepted tokens fed again with the target's.

    Args:
        draft (`MSDDraftModel`): the draft.
        target (`TargetAdapter`): lends its embedding and head.
        max_slots (`int`, *optional*): bound of what is allocated ahead, see [`InPlaceLayer`].
    """

    def __init__(self, draft: MSDDraftModel, target: TargetAdapter, max_slots: int | None = None):
        self.draft = draft
        self.target = target
        self.cache = Cache(layers=[InPlaceLayer(max_slots) for _ in draft.layers])
        self._prompt_mask: torch.Tensor | None = None
        self._num_slots = 0  # of accepted rows; drafted ones come behind
        self._next_position: torch.Tensor  # [B, 1]
        self._last_state: torch.Tensor  # [B, 1, H], from which the first level of the next tree is drafted

    def prefill(self, prefill: TargetPrefill, token: torch.Tensor) -> None:
        """Feeds the prompt: `token` (`[B]`) is the first one that the target chose after it."""
        device = self.draft.device
        token_embeds = self.target.embed(token.unsqueeze(1))
        inputs_embeds = torch.cat([prefill.inputs_embeds[:, 1:], token_embeds.to(prefill.inputs_embeds)], dim=1)
        visual_mask = torch.cat([prefill.visual_mask[:, 1:], torch.zeros_like(prefill.visual_mask[:, :1])], dim=1)
        batch_size, length = visual_mask.shape
        if prefill.prompt_mask is None:
            position_ids = torch.arange(length, device=device).expand(batch_size, -1)
        else:
            self._prompt_mask = prefill.prompt_mask.to(device)
            position_ids = (self._prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        self._next_position = position_ids[:, -1:] + 1
        self._feed(inputs_embeds, prefill.hidden_states, visual_mask.to(device), position_ids, self._prompt_mask)

    def accept(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """
        Replaces the drafted slots by the tokens that were emitted, with the target's true hidden states.

        Args:
            tokens (`torch.LongTensor` of shape `[B, A]`): the emitted tokens, the bonus token last.
            hidden_states (`torch.Tensor` of shape `[B, A, H]`): the target's, at the position before each of them.
        """
        with phase("cache"):
            truncate(self.cache, self._num_slots)
        count = tokens.shape[1]
        position_ids = self._next_position + torch.arange(count, device=self._next_position.device)
        self._next_position = self._next_position + count
        # Only a mask over padding is needed: among themselves these rows are a chain.
        mask = None
        if self._prompt_mask is not None or count > 1:
            chain = torch.ones(count, count, dtype=torch.bool, device=position_ids.device).tril()
            mask = tree_attention_mask(
                chain.expand(tokens.shape[0], -1, -1), self._num_slots, self.draft.dtype, self._prompt_mask
            )
        self._feed(self.target.embed(tokens), hidden_states, None, position_ids, mask)

    def propose(self, root: torch.Tensor, settings: TreeSettings) -> CandidateTree:
        """
        Grows a tree.

        Args:
            root (`torch.LongTensor` of shape `[B]`): the last emitted token.
            settings (`TreeSettings`): size of the tree.
        """
        growth = TreeGrowth(root, settings)
        if settings.num_nodes == 1:
            return growth.finish()
        log_probs, candidates = self._top_k(self._last_state, settings.top_k)
        tokens, _ = growth.expand(log_probs, candidates)
        parent_states = self._last_state.expand(-1, tokens.shape[1], -1)  # [B, K, H]
        for level in range(settings.depth):
            mask = tree_attention_mask(growth.frontier_ancestors, self._num_slots, self.draft.dtype, self._prompt_mask)
            with phase("draft forward"):
                states = self.draft(
                    inputs_embeds=self._to_draft(self.target.embed(tokens)),
                    hidden_states=parent_states,
                    attention_mask=mask,
                    position_ids=(self._next_position + level).expand(-1, tokens.shape[1]),
                    past_key_values=self.cache,
                ).last_hidden_state
            log_probs, candidates = self._top_k(states, settings.top_k)
            tokens, above = growth.expand(log_probs, candidates)
            parent_states = states.gather(1, above.unsqueeze(2).expand(-1, -1, states.shape[2]))
        return growth.finish()

    def _feed(self, inputs_embeds, hidden_states, visual_mask, position_ids, attention_mask) -> None:
        with phase("draft forward"):
            states = self.draft(
                inputs_embeds=self._to_draft(inputs_embeds),
                hidden_states=self._to_draft(hidden_states),
                visual_mask=visual_mask,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=self.cache,
            ).last_hidden_state
        self._num_slots += states.shape[1]
        self._last_state = states[:, -1:]

    def _to_draft(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(device=self.draft.device, dtype=self.draft.dtype)

    def _top_k(self, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and tokens `[B, F, K]` of the best candidates after each of `states` `[B, F, H]`."""
        with phase("draft head"):
            logits = self.target.head(states)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        values, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        log_probs = values - logits.logsumexp(-1, keepdim=True)
        return log_probs.to(self.draft.device), tokens.to(self.draft.device)


__all__ = ["MSDCandidateGenerator"]
