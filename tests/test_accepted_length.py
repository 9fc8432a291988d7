"""The loss on the expected accepted length equals a sum over chains by hand, and needs a weight."""

import pytest
import torch
from tiny import build_draft, build_target

from msd_hf.errors import MSDError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.chains import Chains
from msd_hf.training.objective import DraftObjective
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states


OTHERS = {"feature_loss_weight": 0.0, "token_loss_weight": 0.0, "noise": 0.0}


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


def missing_by_hand(target, draft, input_ids, trained, num_passes, labels_of):
    """The drafted tokens that are expected to be refused, chain by chain."""
    features = TargetAdapter(target).features(input_ids)
    rows = draft_rows(features.inputs_embeds, features.hidden_states, features.visual_mask, trained)
    passes = list(unrolled_states(draft, rows, num_passes))
    missing = 0.0
    for sample, start in trained.nonzero().tolist():
        reached = 1.0
        for depth in range(num_passes):
            row = start + depth
            if row >= trained.shape[1] or not trained[sample, row]:
                break
            probs = target.lm_head(passes[depth][sample, row]).softmax(-1)
            reached = reached * torch.minimum(probs, labels_of(target.lm_head(rows.goals[sample, row]))).sum()
            missing = missing + (1 - reached)
    return missing


def greedy(logits):
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)


@pytest.mark.parametrize("temperature, labels_of", [(1.0, lambda logits: logits.softmax(-1)), (0.0, greedy)])
@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_loss_and_its_gradient_equal_a_sum_over_chains(parts, num_passes, chunk_size, temperature, labels_of):
    target, draft, batch, trained, objective = parts
    compute = objective(
        **OTHERS,
        accepted_length_loss_weight=0.5,
        label_temperature=temperature,
        unroll_passes=num_passes,
        head_chunk_size=chunk_size,
    )
    total, sums = compute(draft, batch, draft.dtype)
    expected = missing_by_hand(target, draft, batch["input_ids"], trained, num_passes, labels_of)
    torch.testing.assert_close(total, 0.5 * expected)
    torch.testing.assert_close(sums.terms["accepted_length_loss"], expected)
    names, parameters = zip(*draft.named_parameters(), strict=True)
    got = torch.autograd.grad(total, parameters)
    plain = torch.autograd.grad(0.5 * expected, parameters)
    for name, one, other in zip(names, got, plain, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_a_chain_that_is_sure_to_be_accepted_misses_nothing():
    trained = torch.tensor([[False, True, True, True]])
    chains = Chains()
    chains.add(torch.tensor([1.0, 0.5, 1.0]), trained)
    assert chains.missing == 0.5
    trained = torch.tensor([[False, False, True, True]])
    chains.add(torch.ones(2), trained)
    assert chains.missing == 0.5 + 0.5  # only the chain whose first token is in doubt


def test_without_a_weight_nothing_is_computed(parts):
    _, draft, batch, _, objective = parts
    _, sums = objective(noise=0.0)(draft, batch, draft.dtype)
    assert sums.terms.keys() == {"feature_loss", "token_loss"} and not sums.acceptances


@pytest.mark.parametrize("name", ["accepted_length_loss_weight", "label_temperature"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_negative_value_is_refused(parts, name, value):
    with pytest.raises(MSDError, match=f"`{name}` must not be negative"):
        parts[-1](**{name: value})


def test_a_temperature_that_would_overflow_is_refused(parts):
    with pytest.raises(MSDError, match="`label_temperature` must be 0, which is greedy, or at least"):
        parts[-1](label_temperature=1e-30)
