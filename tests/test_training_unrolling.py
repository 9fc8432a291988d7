"""Unrolled passes equal drafting, in which `GrowingDrafter` grows a chain from each row, and need little memory."""

import pytest
import torch
from tiny import build_draft, build_target
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from msd_hf.attention.masks import additive_mask, tree_attention_mask
from msd_hf.attention.unrolled import attend_with_own_keys
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
        torch.nn.init.normal_(draft.feature_proj.weight, std=0.3, generator=torch.Generator().manual_seed(0))
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


def dense_passes(draft, rows, num_passes):
    """The same passes with masks over the keys of all passes, which take memory quadratic in the length."""
    length, dtype = rows.visual_mask.shape[1], draft.dtype
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)  # from key to query
    layer_states, hidden_states = rows.reads.split(rows.hidden_states)
    cache, states = DynamicCache(), None
    for number in range(num_passes):
        if states is not None:
            hidden_states, layer_states = torch.cat([states[:, :1], states[:, :-1]], dim=1), None
        seen = [distance >= number, *(distance == number - earlier for earlier in range(1, number + 1))]
        states = draft(
            inputs_embeds=rows.inputs_embeds,
            hidden_states=hidden_states,
            visual_mask=rows.visual_mask,
            layer_states=layer_states,
            attention_mask=additive_mask(torch.cat(seen, dim=1), dtype)[None, None],
            position_ids=rows.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        yield states


def states_and_gradients(passes, draft):
    draft.zero_grad()
    passes = list(passes)
    sum(number * states.sin().sum() for number, states in enumerate(passes, 1)).backward()
    return [*passes, *(weight.grad for weight in draft.parameters())]


def make_rows(target, length):
    features = TargetAdapter(target).features(torch.randint(3, 50, (2, length)))
    visual_mask = torch.zeros(2, length, dtype=torch.bool)
    visual_mask[:, 2:4] = True
    return draft_rows(features.inputs_embeds, features.hidden_states, visual_mask, ~visual_mask)


@pytest.mark.parametrize("length", [1, 3, 30])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_states_and_gradients_equal_those_with_dense_masks(length, num_kv_heads):
    target = build_target(seed=3, num_kv_heads=num_kv_heads)
    draft = build_draft(target, seed=4, num_hidden_layers=2).train()
    rows = make_rows(target, length)
    got = states_and_gradients(unrolled_states(draft, rows, 4), draft)
    expected = states_and_gradients(dense_passes(draft, rows, 4), draft)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_checkpointing_changes_no_gradient():
    target = build_target(seed=3)
    draft = build_draft(target, seed=4, num_hidden_layers=2).train()
    rows = make_rows(target, 12)
    expected = states_and_gradients(unrolled_states(draft, rows, 3), draft)
    draft.gradient_checkpointing_enable()
    got = states_and_gradients(unrolled_states(draft, rows, 3), draft)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_half_precision_rounds_hardly_more_than_usual_attention():
    """The score of a row with its own key is computed apart, and must not be rounded to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    given = [(8 * torch.randn(1, 2, 40, 16, generator=generator)).to(torch.bfloat16) for _ in range(3)]
    queries, keys, values = given
    exact = scaled_dot_product_attention(*(states.double() for states in given), is_causal=True)
    usual = scaled_dot_product_attention(*given, is_causal=True)
    # Every row sees itself through a key of its own.
    own = attend_with_own_keys(queries, keys, values, [keys], [values], 16**-0.5)
    errors = [(states.double() - exact).square().mean().sqrt() for states in (own, usual)]
    assert errors[0] < 1.4 * errors[1]


@pytest.mark.parametrize("num_passes", [1, 3])
def test_no_tensor_grows_with_the_square_of_the_length(num_passes):
    target = build_target(seed=3, num_kv_heads=2)
    draft = build_draft(target, seed=4).train()

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [part.untyped_storage().nbytes() for part in tree_leaves(result) if torch.is_tensor(part)]
            self.most = max(self.most, *sizes, 0)
            return result

    most = []
    for length in (300, 600):
        rows = make_rows(target, length)
        with Largest() as seen:
            sum(states.sum() for states in unrolled_states(draft, rows, num_passes)).backward()
        most.append(seen.most)
    assert most[1] < 2.1 * most[0]
