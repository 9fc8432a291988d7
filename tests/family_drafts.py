"""Drafts that are fitted briefly to a tiny target of any family, so that some of their candidates are accepted."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import shared_fits
import torch
from families import FAMILIES, SPECIAL_TOKEN_IDS, Family
from recurrent_families import RECURRENT_FAMILIES
from torch.nn.functional import smooth_l1_loss
from transformers import PreTrainedModel

from msd_hf import MSDDraftModel
from msd_hf.decoders import decoder_of
from msd_hf.target.adapter import TargetAdapter


@dataclass
class FamilyPair:
    """A target of a family and a draft fitted to it."""

    family: Family
    target: PreTrainedModel
    draft: MSDDraftModel


@functools.cache
def family_pair(name: str, seed: int = 0) -> FamilyPair:
    """A target of a family and its draft, built once a session. A test that changes them must restore them."""
    family = {**FAMILIES, **RECURRENT_FAMILIES}[name]
    target = family.build(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = MSDDraftModel.from_target(target)
        settings = draft.generation_config
        settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k = 16, 3, 4
        shared_fits.fitted(f"{name}-{seed}", draft, lambda: fit_draft(draft, family, target, seed=seed))
    return FamilyPair(family, target, draft)


def fit_draft(draft: MSDDraftModel, family: Family, target: PreTrainedModel, steps: int = 50, seed: int = 0) -> None:
    """Fits a draft to text that its target generates, with and without images. Takes about a second. Draws from the
    global generator."""
    dtype = draft.dtype
    draft.float().train()
    kinds = [(0, "first"), (1, "middle")] if family.has_images else [(0, "first")]
    rollouts = [_rollout(family, target, 1000 * (seed + number), *kind) for number, kind in enumerate(kinds)]
    head_weight = target.get_output_embeddings().weight.detach().float()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        embeds, hidden_states, visual_mask, goal_states, goal_probs = rollouts[step % len(rollouts)]
        states = draft(embeds, hidden_states, visual_mask).last_hidden_state
        log_probs = (states @ head_weight.T).log_softmax(-1)
        loss = smooth_l1_loss(states, goal_states) - (goal_probs * log_probs).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    draft.to(dtype).eval()


@torch.no_grad()
def _rollout(
    family: Family,
    target: PreTrainedModel,
    seed: int,
    num_images: int,
    place: str,
    num_prompts: int = 32,
    num_tokens: int = 40,
) -> tuple[torch.Tensor, ...]:
    """
    Inputs and goals of the draft on text that the target generates, in float32: embeddings and visual mask of
    positions 1..., hidden states of positions 0..., the next hidden states, and the target's probabilities after them.
    """
    # Pictures have the same size in all rows, so no row is padded.
    prompts = [family.prompt(seed + row, num_images, place, first_size=seed) for row in range(num_prompts)]
    embedding = target.get_input_embeddings()
    embeds: list[torch.Tensor] = []
    states: list[torch.Tensor] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        # Text-only models embed inside the decoder.
        inputs_embeds = kwargs.get("inputs_embeds")
        embeds.append(embedding(kwargs["input_ids"]) if inputs_embeds is None else inputs_embeds)
        states.append(output[0])

    handle = decoder_of(target).register_forward_hook(record, with_kwargs=True)
    ids = target.generate(
        **family.collate(prompts, dtype=target.dtype),
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.5,
        suppress_tokens=SPECIAL_TOKEN_IDS,
        return_dict_in_generate=True,
        output_hidden_states=True,  # or Gemma 4 would compute its last layers for the last position alone
    ).sequences
    handle.remove()
    # The target has not read the last token.
    all_embeds, all_states = torch.cat(embeds, dim=1).float(), torch.cat(states, dim=1).float()
    visual_mask = TargetAdapter(target).visual_mask(ids[:, :-1])
    # Sharper than the target's distribution, because most tests decode greedily.
    goal_probs = (2 * target.get_output_embeddings()(torch.cat(states, dim=1))[:, 1:]).softmax(-1).float()
    return all_embeds[:, 1:], all_states[:, :-1], visual_mask[:, 1:], all_states[:, 1:], goal_probs
