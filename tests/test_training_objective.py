"""The weighting of unrolled passes and the noise of a batch are compared with sums computed by hand."""

import pytest
import torch
from tiny import build_draft, build_target
from torch.nn import functional

from msd_hf.errors import MSDError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.objective import DraftObjective
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states


@pytest.fixture
def parts(tmp_path):
    target = build_target(seed=1)
    draft = build_draft(target, seed=2).train()
    input_ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    trained = torch.zeros(2, 9, dtype=torch.bool)
    trained[0, 3:6] = trained[1, 2] = trained[1, 6:8] = True
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(~trained, -100),
        "numbers": torch.tensor([5, 11]),
    }

    def objective(**arguments):
        args = MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
        return DraftObjective(TargetAdapter(target), args)

    return target, draft, batch, trained, objective


def sums_by_hand(target, states, goals, trained):
    feature, token = 0.0, 0.0
    for row, column in trained.nonzero().tolist():
        state, goal = states[row, column], goals[row, column]
        feature = feature + functional.smooth_l1_loss(state, goal)
        token = token - (target.lm_head(goal).softmax(-1) * target.lm_head(state).log_softmax(-1)).sum()
    return 1.0 * feature + 0.1 * token


def test_later_passes_weigh_less_and_count_only_rows_that_generation_drafts(parts):
    target, draft, batch, trained, objective = parts
    total, sums = objective(noise=0.0, unroll_passes=3, unroll_decay=0.5)(draft, batch, draft.dtype)
    features = TargetAdapter(target).features(batch["input_ids"])
    rows = draft_rows(features.inputs_embeds, features.hidden_states, features.visual_mask, trained)
    # Drafting k tokens deep at row j begins at row j - k, which must be trained itself.
    counted = [trained, torch.zeros_like(trained), torch.zeros_like(trained)]
    counted[1][0, 4:6] = counted[1][1, 7] = True
    counted[2][0, 5] = True
    expected = 0.0
    for weight, states, mask in zip((4 / 7, 2 / 7, 1 / 7), unrolled_states(draft, rows, 3), counted, strict=True):
        expected = expected + weight * sums_by_hand(target, states, rows.goals, mask)
    torch.testing.assert_close(total, expected)
    assert sums.num_rows == 6
    evaluated, _ = objective(noise=0.0, unroll_passes=3)(draft.eval(), batch, draft.dtype)
    first = next(iter(unrolled_states(draft, rows, 1)))
    torch.testing.assert_close(evaluated, sums_by_hand(target, first, rows.goals, trained))


def test_passes_grow_over_the_run(parts):
    _, draft, batch, _, objective = parts
    growing = objective(noise=0.0, unroll_passes=1, final_unroll_passes=3)
    for progress, num_passes in ((0.0, 1), (0.33, 1), (0.34, 2), (0.66, 2), (0.67, 3), (1.0, 3)):
        fixed, _ = objective(noise=0.0, unroll_passes=num_passes)(draft, batch, draft.dtype)
        assert torch.equal(growing(draft, batch, draft.dtype, progress)[0], fixed), progress
    with pytest.raises(MSDError, match="`final_unroll_passes` must be at least `unroll_passes`, 3, got 2"):
        objective(unroll_passes=3, final_unroll_passes=2)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(MSDError, match="`use_reentrant=True` cannot be combined with"):
        objective(unroll_passes=1, final_unroll_passes=2, **reentrant)


def test_the_target_runs_in_its_own_dtype_under_mixed_precision(parts):
    target, _, batch, _, objective = parts
    target.float()  # autocast leaves float64 alone
    rows = objective().make_rows(batch, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective().make_rows(batch, torch.float32)
    assert torch.equal(mixed.hidden_states, rows.hidden_states) and torch.equal(mixed.goals, rows.goals)


def test_noise_belongs_to_the_sample_and_is_for_training_alone(parts):
    _, draft, batch, _, objective = parts
    with_noise = objective(noise=0.2)
    total, _ = with_noise(draft, batch, draft.dtype)
    assert torch.equal(total, with_noise(draft, batch, draft.dtype)[0])  # the samples' numbers seed the noise
    swapped = {name: value.flip(0) for name, value in batch.items()}
    torch.testing.assert_close(with_noise(draft, swapped, draft.dtype)[0], total)
    others = {**batch, "numbers": batch["numbers"] + 1}
    assert not torch.isclose(with_noise(draft, others, draft.dtype)[0], total)
    draft.eval()
    silent, _ = objective(noise=0.0)(draft, batch, draft.dtype)
    assert torch.equal(with_noise(draft, batch, draft.dtype)[0], silent)
