"""Visual rows that are left unread in training are as if they were not there."""

from __future__ import annotations

import pytest
import torch
from tiny import build_draft, build_target, make_prompt

from msd_hf.drafting.visual_rows import KeptRows
from msd_hf.errors import MSDError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.objective import DraftObjective
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states
from msd_hf.training.visual_row_dropout import unread_rows


@pytest.fixture
def pair():
    target = build_target(seed=1)
    return target, build_draft(target, seed=2)


def rows_of(target, inputs):
    features = TargetAdapter(target).features(**inputs)
    trained = torch.zeros_like(features.visual_mask)
    trained[:, -6:-1] = True
    return draft_rows(features.inputs_embeds, features.hidden_states, features.visual_mask, trained)


def test_unread_rows_are_as_if_they_were_left_out(pair):
    """The same draft reads the rows that are left, at their true positions."""
    target, draft = pair
    rows = rows_of(target, make_prompt(0, 12, (3,)))
    rows.unread = torch.zeros_like(rows.visual_mask)
    rows.unread[0, rows.visual_mask[0].nonzero().squeeze(1)[1:]] = True  # all visual rows but the first
    got = next(unrolled_states(draft, rows))
    kept = KeptRows((~rows.unread[0]).nonzero().T, None)
    expected = draft(
        inputs_embeds=kept.of(rows.inputs_embeds),
        hidden_states=kept.of(rows.hidden_states),
        visual_mask=kept.of(rows.visual_mask),
        position_ids=kept.index,
        attention_mask=torch.ones_like(kept.index),  # else transformers takes the gap for two packed texts
    ).last_hidden_state
    torch.testing.assert_close(kept.of(got), expected)
    with_all = next(unrolled_states(draft, rows_of(target, make_prompt(0, 12, (3,)))))
    assert not torch.allclose(kept.of(with_all)[:, -6:], expected[:, -6:])


def test_later_passes_do_not_see_them_either(pair):
    """What stands in unread rows changes nothing, in any pass."""
    target, draft = pair
    states = []
    for scale in (1.0, 50.0):
        rows = rows_of(target, make_prompt(0, 12, (3,)))
        rows.unread = rows.visual_mask.clone()
        rows.inputs_embeds = torch.where(rows.visual_mask.unsqueeze(2), scale * rows.inputs_embeds, rows.inputs_embeds)
        states.append(list(unrolled_states(draft, rows, 3)))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one[:, -5:], other[:, -5:])


def test_gradients_are_finite_where_a_text_begins_with_unread_rows(pair):
    target, draft = pair
    inputs = make_prompt(0, 12, (0,))
    rows = rows_of(target, inputs)
    rows.unread = rows.visual_mask.clone()
    assert rows.unread[0, :2].any()
    for states in unrolled_states(draft, rows, 3):
        states[rows.trained].sum().backward(retain_graph=True)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in draft.parameters())


def test_budgets_depend_on_the_sample_alone_and_have_every_size():
    visual = torch.zeros(1, 700, dtype=torch.bool)
    visual[0, 10:650] = True

    def left(number, share=1.0, seed=0):
        unread = unread_rows(visual, torch.tensor([number]), share, seed)
        assert not (unread & ~visual).any()
        return int((visual & ~unread).sum())

    sizes = [left(number) for number in range(400)]
    assert min(sizes) < 3 and max(sizes) > 500
    assert 0.35 < sum(size < 25 for size in sizes) / 400 < 0.65  # 25 is about the root of 640
    assert sizes == [left(number) for number in range(400)] != [left(number, seed=1) for number in range(400)]
    untouched = sum(left(number, share=0.25) == 640 for number in range(400))
    assert 260 < untouched < 340
    two = unread_rows(visual.expand(2, -1), torch.tensor([7, 3]), 1.0, 0)
    assert int((visual & ~two[1]).sum()) == sizes[3]


def test_only_training_leaves_rows_out(pair, tmp_path):
    target, draft = pair
    inputs = make_prompt(0, 12, (3,))
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    batch = {**inputs, "labels": labels, "numbers": torch.tensor([2])}
    batch.setdefault("attention_mask", torch.ones_like(labels))

    def loss(model, share):
        args = MSDTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", noise=0.0, visual_row_dropout=share
        )
        return DraftObjective(TargetAdapter(target), args)(model, batch, draft.dtype)[0].item()

    assert loss(draft.train(), 1.0) != loss(draft.train(), 0.0)
    assert loss(draft.eval(), 1.0) == loss(draft.eval(), 0.0)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_the_share_is_checked(share, tmp_path):
    with pytest.raises(MSDError, match="`visual_row_dropout` must be between 0 and 1"):
        MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", visual_row_dropout=share)
