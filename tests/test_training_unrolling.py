"""Unrolled passes equal drafting, in which `GrowingDrafter` grows a chain from each row."""

import pytest
import torch
from tiny import build_draft, build_target

from msd_hf.attention.masks import tree_attention_mask
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.kv.in_place import truncate
from msd_hf.kv.slots import ContextSlots
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("target_layers", [None, [0, 1]])
def test_pass_k_equals_drafting_k_tokens_deep(attention, target_layers):
    target = build_target(seed=3)
    draft = build_draft(target, seed=4, attn_implementation=attention, target_layers=target_layers)
    adapter = TargetAdapter(target, target_layers)
    if target_layers:
        torch.nn.init.normal_(draft.feature_proj.weight, std=0.3)
    length, num_passes = 9, 4
    tokens = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(0))
    features = adapter.features(tokens)
    visual_mask = torch.zeros_like(tokens, dtype=torch.bool)
    visual_mask[:, 2:4] = True
    rows = draft_rows(features.inputs_embeds, features.hidden_states, visual_mask, ~visual_mask, adapter.reads)
    layer_states, last_states = adapter.reads.split(rows.hidden_states)
    passes = list(unrolled_states(draft, rows, num_passes))
    # The oracle: feed rows 0..i with true states, then the following tokens one by one with the draft's own output.
    for last_true in range(3, length - num_passes):
        generator = GrowingDrafter(draft, adapter)
        states = draft(
            rows.inputs_embeds[:, : last_true + 1],
            last_states[:, : last_true + 1],
            rows.visual_mask[:, : last_true + 1],
            layer_states=None if layer_states is None else layer_states[:, : last_true + 1],
            past_key_values=generator.cache,
        ).last_hidden_state[:, -1:]
        torch.testing.assert_close(passes[0][:, last_true : last_true + 1], states, atol=2e-6, rtol=0)
        for number in range(1, num_passes):
            row = last_true + number
            states = draft(
                inputs_embeds=rows.inputs_embeds[:, row : row + 1],
                hidden_states=states,
                position_ids=torch.full((2, 1), row),
                attention_mask=tree_attention_mask(
                    torch.ones(2, 1, 1, dtype=torch.bool), ContextSlots([row] * 2), draft.dtype
                ),
                past_key_values=generator.cache,
            ).last_hidden_state
            torch.testing.assert_close(
                passes[number][:, row : row + 1], states, atol=2e-6, rtol=0
            )  # eager softmax is float32
        truncate(generator.cache, 0)


def test_gradients_flow_through_all_passes():
    target = build_target(seed=3)
    draft = build_draft(target, seed=4).train()
    features = TargetAdapter(target).features(torch.randint(3, 50, (1, 8)))
    rows = draft_rows(features.inputs_embeds, features.hidden_states, features.visual_mask, ~features.visual_mask)
    first, second, third = unrolled_states(draft, rows, 3)
    (through_third,) = torch.autograd.grad(third[:, 5].sum(), draft.fc.weight, retain_graph=True)
    with torch.no_grad():
        detached = list(unrolled_states(draft, rows, 3))
    assert through_third.abs().sum() > 0 and not detached[2].requires_grad
    assert torch.autograd.grad(third[:, 5].sum(), first, retain_graph=True)[0][:, 3].abs().sum() > 0
    assert torch.autograd.grad(third[:, 5].sum(), second)[0][:, 4].abs().sum() > 0
