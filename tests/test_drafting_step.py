"""The shortened forward that drafts trees gives the results of the draft's own forward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import Cache

from msd_hf import MSDDraftConfig, MSDDraftModel
from msd_hf.drafting.step import DraftingStep
from msd_hf.kv.in_place import InPlaceLayer, truncate


KINDS = {
    "llava": {},
    "qwen2": {"input_layernorm": True, "attention_bias": True, "num_key_value_heads": 2},
    "grouped": {"num_key_value_heads": 1, "num_hidden_layers": 2},
    "wide heads": {"head_dim": 16},
    "scaled": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "by length": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_step_equals_the_forward_of_the_draft(kind, batch_size, attention):
    torch.manual_seed(0)
    config = MSDDraftConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=64, **KINDS[kind]
    )
    draft = MSDDraftModel(config).eval()
    draft.set_attn_implementation(attention)
    step = DraftingStep(draft)
    caches = [Cache(layers=[InPlaceLayer() for _ in draft.layers]) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            torch.manual_seed(1)
            draft(torch.randn(batch_size, 9, 32), torch.randn(batch_size, 9, 32), past_key_values=cache)
        for length, masked in ((4, True), (1, True), (1, False), (6, True)):
            embeds, states = torch.randn(2, batch_size, length, 32)
            positions = torch.randint(9, 40, (batch_size, length))
            mask = None
            if masked:
                hidden = torch.rand(batch_size, 1, length, 9 + length) < 0.3
                mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
            expected = draft(
                embeds, states, attention_mask=mask, position_ids=positions, past_key_values=caches[0]
            ).last_hidden_state
            got = step(embeds, states, positions, mask, caches[1], 40)
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
            for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
                torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-6, rtol=1e-5)
                torch.testing.assert_close(ours.values, theirs.values, atol=2e-6, rtol=1e-5)
            for cache in caches:
                truncate(cache, 9)


def test_tables_grow_for_positions_beyond_them():
    """The token sees a context, because a token that sees only itself has the same states at any position."""
    torch.manual_seed(0)
    draft = MSDDraftModel(MSDDraftConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)).eval()
    for weight in draft.layers[0].self_attn.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    step, cache = DraftingStep(draft), Cache(layers=[InPlaceLayer()])
    with torch.no_grad():
        draft(*torch.randn(2, 1, 6, 32), past_key_values=cache)
    embeds, states = torch.randn(2, 1, 1, 32)
    seen = []
    for position in (3, 5000, 20000):
        positions = torch.tensor([[position]])
        got = step(embeds, states, positions, None, cache, position)
        truncate(cache, 6)
        with torch.no_grad():
            expected = draft(embeds, states, position_ids=positions, past_key_values=cache).last_hidden_state
        truncate(cache, 6)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
        seen.append(got)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(seen))


@pytest.mark.parametrize("kind", ["hook", "forward", "subclass"])
def test_changed_modules_are_called(kind):
    class Doubled(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    torch.manual_seed(0)
    draft = MSDDraftModel(MSDDraftConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)).eval()
    caches = [Cache(layers=[InPlaceLayer()]) for _ in range(3)]
    inputs = torch.randn(2, 1, 1, 32)
    positions = torch.tensor([[3]])
    before = DraftingStep(draft)(*inputs, positions, None, caches[0], 3)
    for module in (draft.fc, draft.layers[0].self_attn.v_proj, draft.layers[0].mlp.up_proj):
        if kind == "hook":
            module.register_forward_hook(lambda module, args, output: 2 * output)
        elif kind == "forward":
            module.forward = lambda states, forward=module.forward: 2 * forward(states)
        else:
            module.__class__ = Doubled
    with torch.no_grad():
        expected = draft(*inputs, position_ids=positions, past_key_values=caches[1]).last_hidden_state
    got = DraftingStep(draft)(*inputs, positions, None, caches[2], 3)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert (got - before).abs().max() > 0.01
