"""Samples that went badly are drawn again: by what was known at the start of an epoch, whatever happens in between."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from training_runs import make_trainer

from msd_hf.errors import MSDError
from msd_hf.training.curriculum import Curriculum, CurriculumSampler
from msd_hf.training.hard_examples import HARD_EXAMPLES_NAME, HardExamples


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def seen(examples, agreed, place, is_visual=False, rows=4):
    """Adds one sample with some rows, of which the draft agreed at the first `agreed`."""
    trained = torch.arange(6).unsqueeze(0) < rows
    examples.add(trained, torch.arange(rows) < agreed, torch.tensor([place]), torch.tensor([is_visual]))


def test_bad_samples_are_drawn_in_proportion_to_what_was_wrong(accelerator):
    examples = HardExamples({"text": 4, "visual": 2})
    for place, agreed in enumerate((4, 3, 1)):  # wrong at 0, 1 and 3 of 4 rows; the last sample was not seen
        seen(examples, agreed, place)
    draws = random.Random(0)
    assert examples.draw("text", draws) is None  # its epoch has not begun
    examples.begin_epoch(1, accelerator)
    counts = Counter(examples.draw("text", draws) for _ in range(4000))
    assert counts.keys() == {1, 2} and counts[2] / counts[1] == pytest.approx(3, rel=0.15)
    assert examples.draw("visual", draws) is None
    seen(examples, 0, 1, is_visual=True)
    seen(examples, 4, 2)
    assert examples.draw("visual", draws) is None and examples.draw("text", draws) is not None
    examples.begin_epoch(2, accelerator)
    assert examples.draw("visual", draws) == 1
    assert {examples.draw("text", draws) for _ in range(50)} == {1}  # of sample 1 nothing new is known


def test_the_share_of_draws_that_are_hard():
    sampler = CurriculumSampler(50, 50, Curriculum("mixed"), 100, 1000, 3, 0.3, lambda kind, draws: -1)
    plain = CurriculumSampler(50, 50, Curriculum("mixed"), 100, 1000, 3)
    pairs = [(sampler.draw(number), plain.draw(number)) for number in range(1000)]
    assert all(one.place in (-1, other.place) and one.kind == other.kind for one, other in pairs)
    assert sum(one.place == -1 for one, _ in pairs) / 1000 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("at", ["within an epoch", "between epochs"])
def test_what_a_checkpoint_holds_goes_on_the_same(at, accelerator, tmp_path):
    def first_part(examples):
        seen(examples, 3, 0)
        examples.begin_epoch(1, accelerator)
        seen(examples, 1, 1)

    def second_part(examples):
        drawn = []
        if at == "within an epoch":
            examples.begin_epoch(1, accelerator)  # as a resumed trainer calls it
            drawn = [examples.draw("text", random.Random(number)) for number in range(40)]
            assert set(drawn) == {0}  # of sample 1 nothing was known when the epoch began
            seen(examples, 0, 1)
        examples.begin_epoch(2, accelerator)
        return drawn + [examples.draw("text", random.Random(number)) for number in range(40)]

    whole, resumed = HardExamples({"text": 3}), HardExamples({"text": 3})
    first_part(whole)
    whole.save(tmp_path, accelerator, True)
    resumed.load(tmp_path, True)
    assert second_part(resumed) == second_part(whole)
    other = HardExamples({"text": 3})
    other.load(tmp_path, False)  # another process has the counts
    other.begin_epoch(2, accelerator)
    assert {other.draw("text", random.Random(number)) for number in range(40)} == {0}


def test_stopped_and_resumed_is_the_same_to_the_bit(small_target, toy_processor, training_data, tmp_path, monkeypatch):
    places = []
    draw = HardExamples.draw
    monkeypatch.setattr(HardExamples, "draw", lambda *args: places.append(draw(*args)) or places[-1])
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 12,
        "max_length": 128,
        "save_strategy": "steps",
        "save_steps": 1,
        "hard_example_mixing": 0.5,
    }

    def make(folder, **more):
        return make_trainer(small_target, toy_processor, training_data, tmp_path / folder, **{**arguments, **more})

    whole = make("whole", dataloader_num_workers=1)
    whole.train()
    assert sum(place is not None for place in places) > 10
    assert not (tmp_path / "whole" / HARD_EXAMPLES_NAME).exists()  # only in checkpoints
    for checkpoint in (3, 4):  # within the second epoch of 2 steps, and at its end
        resumed = make(f"from-{checkpoint}", save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
        weights = resumed.model.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())


class Stream:
    def __iter__(self):
        return iter(())


def test_a_run_in_which_nothing_can_be_drawn_again_is_refused(small_target, toy_processor, training_data, tmp_path):
    def make(data=training_data, **arguments):
        make_trainer(small_target, toy_processor, data, tmp_path, hard_example_mixing=0.5, **arguments)

    with pytest.raises(MSDError, match="this run of 4 steps has one epoch of 6"):
        make()
    with pytest.raises(MSDError, match="a streamed data set has them in its order alone"):
        make({"text": Stream(), "visual": training_data["visual"]})
    with pytest.raises(MSDError, match="`hard_example_mixing` must be between 0 and 1"):
        make_trainer(small_target, toy_processor, training_data, tmp_path, hard_example_mixing=1.5)
