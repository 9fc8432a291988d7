"""The draft's pass over a prompt computes the last row alone, and the same keys and values as the whole forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache

from msd_hf import Eagle3DraftConfig, Eagle3DraftModel, MSDDraftConfig, MSDDraftModel
from msd_hf.kv.in_place import InPlaceLayer


def make_draft(**overrides) -> MSDDraftModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    draft = MSDDraftModel(MSDDraftConfig(**{**sizes, "num_key_value_heads": 2, **overrides})).double().eval()
    for name, parameter in draft.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return draft


def make_inputs(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeds, states = torch.randn(2, batch_size, length, 32, generator=generator, dtype=torch.float64)
    visual = torch.zeros(batch_size, length, dtype=torch.bool)
    visual[:, 2 : length - 2] = True
    return {"inputs_embeds": embeds, "hidden_states": states, "visual_mask": visual}


def keys_of(cache: Cache) -> list[torch.Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


KINDS = {
    "plain": {},
    "biases and a norm": {"attention_bias": True, "input_layernorm": True},
    "two layers": {"num_hidden_layers": 2},
    "not decoupled": {"decouple_visual_tokens": False},
    "fewer positions": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
}


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_last_row_and_cache_are_those_of_the_whole_forward(kind, is_padded):
    draft = make_draft(**KINDS[kind])
    inputs = make_inputs(3, 9)
    if is_padded:
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[1, :4] = 0
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    caches = DynamicCache(config=draft.config), DynamicCache(config=draft.config)
    whole = draft(**inputs, past_key_values=caches[0]).last_hidden_state
    last = draft(**inputs, past_key_values=caches[1], last_row_only=True).last_hidden_state
    assert last.shape == (3, 1, 32)
    torch.testing.assert_close(last, whole[:, -1:])
    for ours, theirs in zip(keys_of(caches[1]), keys_of(caches[0]), strict=True):
        seen = slice(None)
        if is_padded and kind == "two layers":  # rows that see nothing have no meaning
            seen = slice(4, None)
        torch.testing.assert_close(ours[:, :, seen], theirs[:, :, seen])


@torch.no_grad()
def test_rows_behind_held_ones():
    draft = make_draft()
    first, second = make_inputs(1, 7), make_inputs(1, 5)
    results = []
    for last_row_only in (False, True):
        cache = Cache(layers=[InPlaceLayer()])
        draft(**first, past_key_values=cache)
        visible = torch.ones(5, 12).tril(diagonal=7).bool()
        visible[:, 3] = False  # a slot that nobody may see
        mask = torch.zeros(5, 12, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
        output = draft(
            **second, past_key_values=cache, attention_mask=mask[None, None], last_row_only=last_row_only
        ).last_hidden_state
        results.append((output[:, -1:], *keys_of(cache)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_other_attention_implementations_give_the_last_row_too():
    draft = make_draft()
    inputs = make_inputs(2, 6)
    expected = draft(**inputs).last_hidden_state[:, -1:]
    draft.set_attn_implementation("eager")
    torch.testing.assert_close(draft(**inputs, last_row_only=True).last_hidden_state, expected)


@torch.no_grad()
def test_fc_runs_over_text_rows_alone():
    """Visual rows are fed as they are, so that nothing need be computed for them."""
    draft = make_draft()
    rows = []
    draft.fc.register_forward_hook(lambda module, args, output: rows.append(output.flatten(0, -2).shape[0]))
    inputs = make_inputs(2, 30)
    states = draft.fuse(**inputs)
    assert rows == [2 * 4]
    assert torch.equal(states[inputs["visual_mask"]], inputs["inputs_embeds"][inputs["visual_mask"]])
    with torch.enable_grad():
        torch.testing.assert_close(draft.fuse(**inputs), states)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_eagle3_drafts_compute_the_last_row_alone_too(num_layers, qk_norm):
    torch.manual_seed(0)
    config = Eagle3DraftConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        qk_norm=qk_norm,
        draft_vocab_size=None,
    )
    draft = Eagle3DraftModel(config).double().eval()
    inputs = make_inputs(2, 9)
    caches = DynamicCache(config=config), DynamicCache(config=config)
    whole = draft(**inputs, past_key_values=caches[0]).last_hidden_state
    last = draft(**inputs, past_key_values=caches[1], last_row_only=True).last_hidden_state
    torch.testing.assert_close(last, whole[:, -1:])
    for ours, theirs in zip(keys_of(caches[1]), keys_of(caches[0]), strict=True):
        torch.testing.assert_close(ours, theirs)
