"""Training at its edges: noise before several passes, seeds, samples that a resumed run skips, the target, sums."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_trainer import StopAfter
from training_runs import NUM_SAMPLES, make_trainer

from msd_hf.errors import MSDDataError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments, extract_features, load_conversations
from msd_hf.training.losses import loss_sums
from msd_hf.training.objective import DraftObjective


# Noise.


@pytest.fixture(scope="module")
def noisy_batch():
    """A target, a draft in training mode, and a batch of two samples."""
    target = tiny.build_target(seed=1)
    draft = tiny.build_draft(target, seed=2).train()
    input_ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    trained = torch.zeros(2, 9, dtype=torch.bool)
    trained[:, 3:7] = True
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(~trained, -100),
        "numbers": torch.tensor([5, 11]),
    }
    return target, draft, batch


def first_pass(noisy_batch, folder, **arguments) -> torch.Tensor:
    """The feature loss of the first pass."""
    target, draft, batch = noisy_batch
    args = MSDTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **arguments)
    _, sums = DraftObjective(TargetAdapter(target), args)(draft, batch, draft.dtype)
    return sums.terms["feature_loss"].detach()


def test_the_first_of_several_passes_reads_the_noise(noisy_batch, tmp_path):
    once, thrice = (first_pass(noisy_batch, tmp_path, noise=0.2, unroll_passes=number) for number in (1, 3))
    torch.testing.assert_close(thrice, once, atol=1e-12, rtol=0)
    assert (once - first_pass(noisy_batch, tmp_path, noise=0.0)).abs() > 1e-3


@pytest.mark.parametrize("arguments", [{"seed": 1}, {"seed": 1, "unroll_passes": 2}], ids=str)
def test_another_seed_draws_other_noise(arguments, noisy_batch, tmp_path):
    losses = [first_pass(noisy_batch, tmp_path, noise=0.2, **{**arguments, "seed": seed}) for seed in (0, 1, 0)]
    assert torch.equal(losses[0], losses[2]) and (losses[0] - losses[1]).abs() > 1e-4


# Samples.


@pytest.mark.parametrize("curriculum", ["text", "mixed"])
def test_the_seed_of_the_data_chooses_the_samples(curriculum, small_target, toy_processor, training_data, tmp_path):
    """`data_seed` chooses them if it is given, otherwise `seed` does."""

    def draws(**seeds):
        trainer = make_trainer(
            small_target, toy_processor, training_data, tmp_path, curriculum=curriculum, max_steps=6, **seeds
        )
        return list(trainer._get_train_sampler())

    assert len(draws()) == 24
    assert draws(seed=7) == draws(seed=0, data_seed=7) == draws(seed=1, data_seed=7)
    assert len({tuple(draws(seed=seed)) for seed in range(3)}) == 3
    assert draws(seed=7, data_seed=0) == draws(seed=0)  # a seed of 0 is a seed


def test_a_resumed_run_goes_on_counting_skipped_samples(
    small_target, toy_processor, training_data, tmp_path, raw_samples
):
    """Its provenance names the samples that were skipped before the checkpoint too."""
    samples = [dict(sample) for sample in raw_samples["text"]]
    for index in range(0, NUM_SAMPLES, 4):  # no two in a row: each is met once, at its own draw
        samples[index]["conversations"] = samples[index]["conversations"][:1]
    data = {**training_data, "text": load_conversations(samples)}
    arguments = {"curriculum": "text", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(small_target, toy_processor, data, tmp_path / "whole", **arguments)
    whole.train()
    folder = tmp_path / "resumed"
    make_trainer(small_target, toy_processor, data, folder, callbacks=[StopAfter(4)], **arguments).train()
    resumed = make_trainer(small_target, toy_processor, data, folder, **arguments)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert 0 < sum(resumed._skipped_before.values()) < 6  # some before the checkpoint, some after it
    counts = [trainer.provenance()["data"]["skipped"] for trainer in (whole, resumed)]
    assert counts == [{"no assistant turn": 6}] * 2
    logged = [entry["skipped_samples"] for entry in resumed.state.log_history if "skipped_samples" in entry]
    assert logged[-1] == 6


# The target.


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_extraction_leaves_the_mode_of_the_target(
    fails, is_training, small_target, toy_processor, raw_samples, tmp_path
):
    """The target runs in evaluation mode, and has its own mode again afterwards, also after an error."""
    samples = [dict(raw_samples["text"][index]) for index in range(3)]
    if fails:
        samples[2]["conversations"] = samples[2]["conversations"][:1]
    small_target.train(is_training)
    modes = set()
    small_target.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: modes.add(module.training))
    arguments = {"batch_size": 1, "strict": True}
    if fails:
        with pytest.raises(MSDDataError):
            extract_features(small_target, toy_processor, load_conversations(samples), tmp_path / "f", **arguments)
    else:
        extract_features(small_target, toy_processor, load_conversations(samples), tmp_path / "f", **arguments)
        assert modes == {False}
    assert {module.training for module in small_target.modules()} == {is_training}


# Sums.


@pytest.mark.parametrize("chunk_size", [16, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_half_precision_are_summed_in_float32(dtype, chunk_size):
    """A sum over a thousand rows has eleven bits more than a row; bfloat16 has eight in all."""
    generator = torch.Generator().manual_seed(0)
    states, goals = torch.randn(2, 1500, 8, generator=generator).to(dtype)
    head = torch.nn.Linear(8, 31, bias=False).to(dtype)
    sums = loss_sums(states, goals, head, chunk_size)
    with torch.no_grad():
        logits, goal_logits = head(states).double(), head(goals).double()
    expected = {
        "feature_loss": torch.nn.functional.smooth_l1_loss(states.double(), goals.double(), reduction="none")
        .mean(-1)
        .sum(),
        "token_loss": -(goal_logits.softmax(-1) * logits.log_softmax(-1)).sum(),
    }
    for name, value in expected.items():
        assert sums.terms[name].dtype == torch.float32
        torch.testing.assert_close(sums.terms[name].double(), value, rtol=1e-5, atol=0)
