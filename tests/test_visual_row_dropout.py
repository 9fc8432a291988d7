"""Visual rows that are left unread in training are as if they were not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import build_draft, build_target, make_prompt

from msd_hf.attention.masks import additive_mask
from msd_hf.errors import MSDError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.objective import DraftObjective
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states
from msd_hf.training.visual_row_dropout import unread_rows


FIELDS = ("inputs_embeds", "hidden_states", "visual_mask", "goals", "trained", "positions")


@pytest.fixture
def pair():
    target = build_target(seed=1)
    return target, build_draft(target, seed=2)


def rows_of(target, inputs):
    features = TargetAdapter(target).features(**inputs)
    trained = torch.zeros_like(features.visual_mask)
    trained[:, -6:-1] = True
    return draft_rows(features.inputs_embeds, features.hidden_states, features.visual_mask, trained)


@pytest.mark.parametrize("images_at", [(0,), (3,)])
def test_rows_that_are_left_out_are_as_if_they_were_hidden(pair, images_at):
    """With a mask that hides them, the other rows have the same outputs. A text may begin with such rows."""
    target, draft = pair
    rows = rows_of(target, make_prompt(0, 12, images_at))
    left_out = rows.visual_mask.clone()
    left_out[0, rows.visual_mask[0].nonzero().squeeze(1)[1]] = False  # one visual row stays
    assert left_out[0, 0] == (0 in images_at)
    stays = (~left_out[0]).nonzero().squeeze(1)
    got = next(unrolled_states(draft, rows.without(left_out)))
    length = left_out.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & ~left_out[0] | torch.eye(length, dtype=torch.bool)
    expected = draft(
        inputs_embeds=rows.inputs_embeds,
        hidden_states=rows.hidden_states,
        visual_mask=rows.visual_mask,
        attention_mask=additive_mask(seen, draft.dtype)[None, None],
    ).last_hidden_state
    torch.testing.assert_close(got, expected[:, stays])
    with_all = next(unrolled_states(draft, rows))
    assert not torch.allclose(with_all[:, -6:], expected[:, -6:])


def test_samples_of_a_batch_lose_different_numbers_of_rows(pair):
    """Each sample has the outputs that it has alone."""
    target, draft = pair
    rows = rows_of(target, {"input_ids": torch.randint(3, 50, (2, 14))})
    rows.trained[:] = True
    left_out = torch.zeros(2, 14, dtype=torch.bool)
    left_out[0, 2:7] = left_out[1, 4] = True
    together = rows.without(left_out)
    assert together.positions.shape == (2, 13) and together.trained.sum(1).tolist() == [9, 13]
    for number in (0, 1):
        one = replace(rows, **{name: getattr(rows, name)[number : number + 1] for name in FIELDS})
        alone = one.without(left_out[number : number + 1])
        for states, expected in zip(
            unrolled_states(draft, together, 3), unrolled_states(draft, alone, 3), strict=True
        ):
            own = states[number][together.trained[number]]
            torch.testing.assert_close(own, expected[0][alone.trained[0]])


def test_a_row_behind_a_gap_is_not_trained_in_later_passes(pair):
    """Generation does not reach it from the row that now stands before it."""
    target, _ = pair
    rows = rows_of(target, {"input_ids": torch.randint(3, 50, (1, 10))})
    rows.trained[:] = True
    left_out = torch.zeros(1, 10, dtype=torch.bool)
    left_out[0, 4:6] = True
    moved = rows.without(left_out)
    assert moved.positions.tolist() == [[0, 1, 2, 3, 6, 7, 8, 9]]
    assert moved.drafted_from(1).nonzero()[:, 1].tolist() == [1, 2, 3, 5, 6, 7]
    assert moved.drafted_from(2).nonzero()[:, 1].tolist() == [2, 3, 6, 7]
    assert not moved.drafted_from(8).any() and not moved.drafted_from(9).any()


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
