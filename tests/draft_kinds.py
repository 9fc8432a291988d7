"""Drafts of every kind that `generate` serves, fitted briefly to a tiny target of any family."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import shared_fits
import tiny
import torch
from families import FAMILIES, FIRST_TEXT_TOKEN_ID, NUM_TEXT_TOKENS, SPECIAL_TOKEN_IDS, Family
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from msd_hf import Eagle3DraftModel, MSDDraftModel
from msd_hf.decoders import decoder_of
from msd_hf.target.adapter import TargetAdapter


@dataclass(frozen=True)
class Kind:
    """A kind of draft: its class, and fields of its configuration that differ from the target's decoder."""

    model_class: type
    fields: dict[str, Any] = field(default_factory=dict)


def _eagle3(visual_positions: str, **fields: Any) -> Kind:
    # The targets have two layers: the draft reads the embeddings and the outputs of both.
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    return Kind(Eagle3DraftModel, {**layers, "visual_positions": visual_positions, **fields})


# A new kind is one entry. The EAGLE-3 drafts also differ in the conventions of published ones.
KINDS = {
    "msd": Kind(MSDDraftModel),
    "eagle2": Kind(MSDDraftModel, {"decouple_visual_tokens": False}),
    "eagle3-image_embedding": _eagle3("image_embedding", draft_vocab_size=NUM_TEXT_TOKENS - 8),
    "eagle3-placeholder": _eagle3("placeholder", has_own_embedding=True, norm_before_residual=True),
    "eagle3-pooled": _eagle3("pooled", qk_norm=True),
    "eagle3-dropped": _eagle3("dropped", fc_norm=True, norm_output=True),
    "eagle3-decoupled": _eagle3("decoupled", norm_before_fc=True),
}


@functools.cache
def target_of(name: str) -> PreTrainedModel:
    """A target of a family, built once a session. A test that changes it must restore it."""
    return FAMILIES[name].build(0)


@functools.cache
def draft_of(kind: str, name: str) -> Any:
    """A draft of a kind for `target_of(name)`, built once a session. A test that changes it must restore it."""
    target = target_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draft = KINDS[kind].model_class.from_target(target, **KINDS[kind].fields)
        if isinstance(draft, Eagle3DraftModel):
            if draft.config.draft_vocab_size is not None:
                draft.set_draft_vocab(FIRST_TEXT_TOKEN_ID + torch.arange(draft.config.draft_vocab_size))
            draft.start_from_head(target)
        shared_fits.fitted(f"{kind}-{name}", draft, lambda: _fit(draft, FAMILIES[name], target))
    return tiny.sized(draft)


def _fit(draft: Any, family: Family, target: PreTrainedModel, steps: int = 12) -> None:
    """Fits a draft to text of its target, in two passes: the second reads what the first has put out, as in a tree."""
    dtype = draft.dtype
    draft.float().train()
    ids, goals = _text_of(family.name)
    features = TargetAdapter(target, draft.reads_of(decoder_of(target))).features(ids)
    embeds, states = features.inputs_embeds.float()[:, 1:], features.hidden_states.float()[:, :-1]
    if draft.draft_vocab is not None:
        goals = goals[..., draft.draft_vocab]
    goals = (2 * goals).softmax(-1)  # sharper than the target's distribution, because most tests decode greedily
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1.5e-2, weight_decay=0.0)
    for _ in range(steps):
        own = draft.own_embedding
        given = embeds if own is None else own(ids[:, 1:])
        first = draft(inputs_embeds=given, hidden_states=draft.read_target(states)).last_hidden_state
        second = draft(inputs_embeds=given[:, 1:], hidden_states=first[:, :-1]).last_hidden_state
        loss = _cross_entropy(draft, target, first, goals) + _cross_entropy(draft, target, second, goals[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    draft.to(dtype).eval()


def _cross_entropy(draft: Any, target: PreTrainedModel, states: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    if draft.own_head is None:
        scores = states @ target.get_output_embeddings().weight.detach().float().T
    else:
        scores = draft.own_head(states if draft.head_norm is None else draft.head_norm(states))
    return -(goals * log_softmax(scores, -1)).sum(-1).mean()


@functools.cache
@torch.no_grad()
def _text_of(name: str, num_rows: int = 16, num_tokens: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Text that a target generates, `[B, L]`, and its logits after each token but the first, `[B, L - 1, V]`."""
    family, target = FAMILIES[name], target_of(name)
    inputs = family.collate([family.prompt(1000 + row) for row in range(num_rows)])
    sampling = {"do_sample": True, "temperature": 0.5, "suppress_tokens": SPECIAL_TOKEN_IDS}
    ids = target.generate(**inputs, **sampling, max_new_tokens=num_tokens)
    return ids, target(ids).logits[:, 1:].float()
