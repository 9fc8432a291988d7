"""The embeddings that a draft reads: the target's, or the draft's own."""

from __future__ import annotations

from typing import Any

import torch

from ..draft.interface import Draft
from ..draft.plain_modules import TensorFunction, function_at, function_of
from ..target.adapter import TargetAdapter, TargetPrefill


def embedding_function(draft: Draft, target: TargetAdapter) -> TensorFunction | None:
    """The function from tokens `[...]` to the embeddings that the draft reads; `None` if they are the target's, in
    another dtype or on another device."""
    own: Any = draft.own_embedding
    if own is None:
        return function_at(target.embedding, draft)
    embed, num_rows = function_of(own), own.num_embeddings
    if target.embedding.weight.shape[0] <= num_rows:
        return embed
    # Targets have tokens that were added later, for example that of an image: they share the last row.
    return lambda tokens: embed(tokens.clamp(max=num_rows - 1))


def prompt_embeds(draft: Draft, target: TargetAdapter, prefill: TargetPrefill, tokens: torch.Tensor) -> torch.Tensor:
    """
    The embeddings of a prompt and of the token after it, as the draft reads them.

    Args:
        draft (`Draft`): says what stands at visual positions.
        target (`TargetAdapter`): lends its embedding.
        prefill (`TargetPrefill`): the target's pass over the prompt.
        tokens (`torch.LongTensor` of shape `[B]`): the tokens after the prompt.

    Returns:
        `torch.Tensor` of shape `[B, L + 1, E]`.
    """
    if not _has_other_embeds(draft):
        token_embeds = target.embed(tokens.unsqueeze(1)).to(prefill.inputs_embeds)
        return torch.cat([prefill.inputs_embeds, token_embeds], dim=1)
    prompt = draft_embeds(draft, target, target.tokens_of(prefill), prefill.inputs_embeds, prefill.visual_mask)
    return torch.cat([prompt, _embeds_of(draft, target, tokens.unsqueeze(1))], dim=1)


def draft_embeds(
    draft: Draft, target: TargetAdapter, tokens: torch.Tensor, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor
) -> torch.Tensor:
    """
    The embeddings of a text as the draft reads them.

    Args:
        draft (`Draft`): says what stands at visual positions.
        target (`TargetAdapter`): lends its embedding.
        tokens (`torch.LongTensor` of shape `[B, L]`): the tokens, placeholders at visual positions.
        inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): the embeddings that the target reads.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions.

    Returns:
        `torch.Tensor` of shape `[B, L, E]`.
    """
    if not _has_other_embeds(draft):
        return inputs_embeds
    embeds = _embeds_of(draft, target, tokens)
    visual_mask = visual_mask.to(embeds.device)
    is_placeholder = draft.visual_positions == "placeholder"
    if is_placeholder or embeds.shape[-1] != inputs_embeds.shape[-1] or not bool(visual_mask.any()):
        return embeds
    return torch.where(visual_mask.unsqueeze(2), inputs_embeds.to(embeds), embeds)


def _has_other_embeds(draft: Draft) -> bool:
    """Whether the draft reads other embeddings than the target does."""
    return draft.own_embedding is not None or draft.visual_positions == "placeholder"


def _embeds_of(draft: Draft, target: TargetAdapter, tokens: torch.Tensor) -> torch.Tensor:
    embedding: Any = draft.own_embedding if draft.own_embedding is not None else target.embedding
    tokens = tokens.to(embedding.weight.device).clamp(max=embedding.weight.shape[0] - 1)
    return embedding(tokens).to(draft.device)


__all__ = ["draft_embeds", "embedding_function", "prompt_embeds"]
