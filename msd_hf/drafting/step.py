"""The draft's forward over a few nodes of a tree, which runs many times a round."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from ..draft.interface import Draft
from ..draft.plain_modules import function_of


_MIN_POSITIONS = 1024


class DraftingStep:
    """
    Runs the draft over a few nodes, in less time than the draft's own forward. The mask must be additive; it may be
    left out for one node.

    Args:
        draft (`Draft`): the draft. A draft that is not plain runs its own forward.

    Attributes:
        is_plain (`bool`): whether the draft was plain when this object was made.
    """

    def __init__(self, draft: Draft):
        self.draft = draft
        self._forward = draft.plain_forward(function_of) if draft.is_plain else None
        self.is_plain = self._forward is not None
        self._rotations = torch.empty(0)  # [P, 2, head_dim], see `rotary_table`

    @torch.no_grad()
    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache,
        last_position: int,
        image_vector: torch.Tensor | None = None,
        rotations: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Runs the draft over T nodes of each row, which get slots in the cache.

        Args:
            inputs_embeds, hidden_states, attention_mask, cache: as in [`Draft.__call__`].
            position_ids (`torch.LongTensor` of shape `[B, T]` or `[B, 1]`): positions of the nodes; `[B, 1]` if all
                positions of a row are the same.
            last_position (`int`): upper bound of `position_ids`, known without reading them back from the device.
            image_vector (`torch.Tensor` of shape `[B, 1, H]`, *optional*): see [`Draft.image_vectors`].
            rotations (`tuple[torch.Tensor, torch.Tensor]`, *optional*): those for `position_ids`, if they are there
                already.

        Returns:
            The last hidden states, `[B, T, H]`.
        """
        if self._forward is None:
            vectors: dict[str, Any] = {} if image_vector is None else {"image_vectors": image_vector}
            return self.draft(
                inputs_embeds=inputs_embeds,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids.expand(hidden_states.shape[:2]),
                past_key_values=cache,
                **vectors,
            ).last_hidden_state
        cos, sin = rotations or self.rotations(position_ids, last_position, inputs_embeds)
        return self._forward(inputs_embeds, hidden_states, cos, sin, attention_mask, cache, image_vector=image_vector)

    def rotations(
        self, position_ids: torch.Tensor, last_position: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions `[B, T]`, `[B, 1, T, head_dim]` each, on the device and in the dtype of
        `like`. For a plain draft."""
        if last_position >= len(self._rotations):
            num_positions = max(2 * last_position, _MIN_POSITIONS)
            self._rotations = rotary_table(self.draft.rotary_emb, num_positions, like)
        cos, sin = self._rotations[position_ids.unsqueeze(1)].unbind(3)
        return cos, sin


def rotary_table(rotary_emb: Any, num_positions: int, like: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of the first positions, `[num_positions, 2, head_dim]`, on the device and in the dtype of
    `like`."""
    positions = torch.arange(num_positions, device=like.device)
    cos, sin = rotary_emb(like, positions.unsqueeze(0))
    return torch.stack([cos[0], sin[0]], dim=1)


__all__ = ["DraftingStep", "rotary_table"]
