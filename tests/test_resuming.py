"""A run that is interrupted and resumed ends like one that is not, and a run resumes only from itself."""

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from training_runs import build_small_target, make_trainer
from transformers import EarlyStoppingCallback, TrainerCallback

from msd_hf import MSDDraftModel, loading
from msd_hf.errors import MSDError
from msd_hf.toy.training_data import write_training_data
from msd_hf.training import checkpoint_space, extract_features, load_conversations, regenerate, resuming, script
from msd_hf.training.best_checkpoint import SavedState
from msd_hf.training.checkpoint_space import check_checkpoint_space, count_parameters
from msd_hf.training.features.extraction import FeatureExtractor
from msd_hf.training.regeneration.answers import AnswerGenerator


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def new_trainer(toy_processor, training_data, tmp_path):
    """Makes trainers of the same run: each with a target and a draft of its own."""

    def new(folder="out", target=None, data=training_data, processor=toy_processor, **more):
        target = build_small_target(toy_processor) if target is None else target
        return make_trainer(target, processor, data, tmp_path / folder, **{**SAVING, **more})

    return new


class StepCounter(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.count += 1


def resume(trainer, checkpoint=True):
    """Resumes a run; returns the number of further steps."""
    counter = StepCounter()
    trainer.add_callback(counter)
    trainer.train(resume_from_checkpoint=checkpoint)
    return counter.count


def assert_same_weights(one, other):
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_makes_no_step_and_changes_no_file(new_trainer, tmp_path, caplog):
    first = new_trainer()
    first.train()
    first.save_model()
    before = contents(tmp_path)
    again = new_trainer()
    assert resume(again) == 0 and again.was_finished
    assert "is finished (6 steps): nothing is changed" in caplog.text
    assert contents(tmp_path) == before
    assert_same_weights(first.model, again.model)


def test_a_finished_run_without_checkpoints_is_not_trained_again(new_trainer, tmp_path):
    first = new_trainer(save_strategy="no")
    first.train()
    first.save_model()
    again = new_trainer(save_strategy="no")
    assert resume(again) == 0 and again.was_finished
    assert_same_weights(first.model, again.model)
    with pytest.raises(MSDError, match=r"learning_rate 0\.001, this run has 0\.002"):
        new_trainer(save_strategy="no", learning_rate=2e-3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("more", [{}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "an epoch"])
def test_a_run_that_lacks_only_its_end_makes_no_further_step(more, new_trainer, tmp_path):
    """The run was killed after its last checkpoint, before the draft was saved."""
    whole = new_trainer(**more)
    whole.saves_at_end = False
    whole.train()
    assert not (tmp_path / "out" / "config.json").exists()
    resumed = new_trainer(**more)
    assert resume(resumed) == 0 and not resumed.was_finished and resumed.has_ended
    assert_same_weights(whole.model, MSDDraftModel.from_pretrained(tmp_path / "out"))
    provenance = json.loads((tmp_path / "out" / "training_provenance.json").read_text())
    assert provenance["finished"] and provenance["step"] == whole.state.global_step
    assert "train_loss" not in provenance["metrics"] and provenance["metrics"]["loss"] > 0


def test_early_stopping_ends_a_resumed_run_too(new_trainer, training_data):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 12, "learning_rate": 0.0}
    fields |= {"load_best_model_at_end": True, "metric_for_best_model": "tau", "eval_prompts": 1}
    fields |= {"eval_max_new_tokens": 4, "eval_dataset": [training_data["text"][0]]}

    def run(folder, steps_alone=None):
        callbacks = [EarlyStoppingCallback(3), *([StopAfter(steps_alone)] if steps_alone else [])]
        return new_trainer(folder, callbacks=callbacks, **fields)

    whole = run("whole")
    whole.train()
    assert whole.state.global_step == 4
    run("cut", steps_alone=2).train()
    resumed = run("cut")
    assert resume(resumed) == 2  # the patience before the interruption counts
    ended = run("cut")
    assert resume(ended) == 0 and ended.has_ended
    assert_same_weights(whole.model, ended.model)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def other_samples(raw_samples):
    return load_conversations([raw_samples["text"][index] for index in range(1, 21)])


@pytest.mark.parametrize(
    "more, difference",
    [
        ({"learning_rate": 2e-3}, "learning_rate 0.001, this run has 0.002"),
        ({"seed": 1}, "seed 0, this run has 1"),
        ({"max_length": 300}, "max_length 512, this run has 300"),
        ({"max_steps": 8}, "max_steps 6, this run has 8"),
        ({"recipe": "recommended"}, "recipe paper, this run has recommended"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type linear, this run has cosine"),
        ({"per_device_train_batch_size": 2}, "global_batch_size 4, this run has 2"),
        ({"final_visual_share": 0.5}, "final_visual_share 1.0, this run has 0.5"),
        ({"bf16": True}, "bf16 False, this run has True"),
        ({"callbacks": [EarlyStoppingCallback(3)]}, "early_stopping_patience none, this run has 3"),
        ({"target": "seed 1"}, "with another target"),
        ({"target": "float64"}, "target_dtype float32, this run has float64"),
        ({"data": "other"}, "with other text data"),
        ({"eval_dataset": "other"}, "with other held-out data"),
        ({"target_layers": "0"}, "with another draft at the start; with target_layers none, this run has 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    more, difference, new_trainer, toy_processor, training_data, raw_samples, tmp_path, checkpoint_of_a_run
):
    more = dict(more)
    if more.get("target") == "seed 1":
        more["target"] = build_small_target(toy_processor, seed=1)
    elif more.get("target") == "float64":
        more["target"] = build_small_target(toy_processor).double()
    if "data" in more:
        more["data"] = {**training_data, "text": other_samples(raw_samples)}
    if "eval_dataset" in more:
        more["eval_dataset"] = other_samples(raw_samples)
    (tmp_path / "out").symlink_to(checkpoint_of_a_run)
    before = contents(checkpoint_of_a_run)
    trainer = new_trainer(**more)
    with pytest.raises(MSDError) as error:
        trainer.train(resume_from_checkpoint=True)
    assert difference in str(error.value) and "--force --resume-from-checkpoint PATH" in str(error.value)
    with pytest.raises(MSDError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert difference in str(error.value)
    assert contents(checkpoint_of_a_run) == before


@pytest.fixture(scope="module")
def checkpoint_of_a_run(toy_processor, training_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    target = build_small_target(toy_processor)
    make_trainer(target, toy_processor, training_data, folder, callbacks=[StopAfter(5)], **SAVING).train()
    return folder


def test_arguments_that_do_not_change_the_result_may_differ(new_trainer, tmp_path):
    new_trainer(callbacks=[StopAfter(3)]).train()
    more = {"save_steps": 5, "logging_steps": 3, "save_total_limit": 2, "gradient_accumulation_steps": 4}
    resumed = new_trainer(per_device_train_batch_size=1, **more)
    assert resume(resumed) == 4
    (tmp_path / "out").rename(tmp_path / "moved")
    assert resume(new_trainer("moved")) == 0  # the folder is no part of the run


def test_a_forced_run_trains_on_with_its_own_settings(new_trainer, tmp_path, caplog):
    first = new_trainer()
    first.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-6")
    more = {"max_steps": 8, "learning_rate": 5e-4, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    forced = new_trainer(force=True, **more)
    assert resume(forced, checkpoint) == 2
    assert "max_steps 6, this run has 8" in caplog.text and "because of --force" in caplog.text
    used = [entry["learning_rate"] for entry in forced.state.log_history if "learning_rate" in entry]
    assert used[-2:] == [5e-4, 5e-4] and forced.optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("checkpoint", [True, None])
def test_force_needs_the_path_of_a_checkpoint(checkpoint, new_trainer):
    with pytest.raises(MSDError, match="--force needs the checkpoint to go on from"):
        new_trainer(force=True).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_a_fingerprint_needs_force(new_trainer, tmp_path):
    new_trainer(callbacks=[StopAfter(3)]).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    provenance = json.loads((checkpoint / "training_provenance.json").read_text())
    assert str(tmp_path) not in json.dumps(provenance["fingerprint"])
    del provenance["fingerprint"]
    (checkpoint / "training_provenance.json").write_text(json.dumps(provenance))
    for given in (True, str(checkpoint)):
        with pytest.raises(MSDError, match=r"an older version of msd_hf made it.*--force"):
            new_trainer().train(resume_from_checkpoint=given)
    assert resume(new_trainer(force=True), str(checkpoint)) == 4
    with pytest.raises(MSDError, match="is not a complete checkpoint"):
        new_trainer().train(resume_from_checkpoint=str(tmp_path / "nothing"))


def test_the_checkpoints_of_an_earlier_run_are_passed_over(new_trainer, tmp_path):
    earlier = new_trainer(learning_rate=5e-4)
    earlier.train()
    earlier.save_model()
    new_trainer(callbacks=[StopAfter(3)]).train()  # without resuming, in the same folder
    resumed = new_trainer()
    assert resume(resumed) == 4 and resumed.state.global_step == 6


class SendSignals(TrainerCallback):
    def __init__(self, *signals, step=3):
        self.signals, self.step = signals, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "number, error, save_strategy",
    [
        (signal.SIGTERM, SystemExit, "steps"),
        (signal.SIGINT, KeyboardInterrupt, "epoch"),
        (signal.SIGTERM, SystemExit, "no"),
    ],
)
def test_a_signal_saves_a_checkpoint_before_it_ends_the_run(
    number, error, save_strategy, new_trainer, tmp_path, caplog
):
    more = {"save_strategy": save_strategy}
    whole = new_trainer("whole", **more)
    whole.train()
    cut = new_trainer("cut", callbacks=[SendSignals(number)], **more)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(error) as raised:
        cut.train()
    assert error is KeyboardInterrupt or raised.value.code == 143
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "Training stopped after step 3 of 6" in caplog.text and "--resume-from-checkpoint True" in caplog.text
    assert (tmp_path / "cut" / "checkpoint-3" / "trainer_state.json").is_file()
    resumed = new_trainer("cut", **more)
    assert resume(resumed) == 3
    assert_same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_of_the_data_loader_survive_a_signal_to_all_processes(number, new_trainer, tmp_path):
    class SendToAll(SendSignals):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.step - 1:
                workers = [str(process.pid) for process in multiprocessing.active_children()]
                # From a process of its own: workers know the signals of their parent.
                subprocess.run(["kill", f"-{int(number)}", *workers], check=True)
                time.sleep(0.2)
            super().on_step_begin(args, state, control, **kwargs)

    more = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        new_trainer(callbacks=[SendToAll(number)], **more).train()
    assert (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").is_file()


def test_a_second_signal_ends_the_run_at_once(new_trainer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        new_trainer(callbacks=[SendSignals(signal.SIGINT, signal.SIGINT)]).train()
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def test_a_handler_of_the_user_is_called_after_the_checkpoint(new_trainer, tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append((tmp_path / "out" / "checkpoint-3").is_dir()))
    try:
        trainer = new_trainer(callbacks=[SendSignals(signal.SIGTERM)])
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [True] and not trainer.has_ended


def test_training_in_a_thread_sets_no_handlers(new_trainer):
    trainer, handlers = new_trainer(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            handlers.append(signal.getsignal(signal.SIGTERM))

    trainer.add_callback(Look())
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL] * 6


class FillDisk(TrainerCallback):
    """After a step no file can become longer than a number of bytes."""

    def __init__(self, step, num_bytes):
        self.step, self.num_bytes = step, num_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.RLIM_INFINITY))


@pytest.fixture
def limits():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def save_half_at_step_4(state, path):
    text = json.dumps(dataclasses.asdict(state), default=str)
    Path(path).write_text(text[: len(text) // 2] if state.global_step == 4 else text)
    if state.global_step == 4:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full_at", ["the weights", "the optimizer", "the state"])
def test_a_full_disk_leaves_the_last_complete_checkpoint(full_at, new_trainer, tmp_path, limits, monkeypatch):
    whole = new_trainer("whole")
    whole.train()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    assert sizes["model.safetensors"] + 20_000 < sizes["optimizer.pt"]
    space = {"the weights": 10_000, "the optimizer": sizes["model.safetensors"] + 20_000}.get(full_at)
    cut = new_trainer(callbacks=[FillDisk(3, space)] if space else [])
    with monkeypatch.context() as patch, pytest.raises(MSDError) as error:
        if space is None:
            patch.setattr(SavedState, "save_to_json", save_half_at_step_4)
        cut.train()
    assert "checkpoint-4' could not be written" in str(error.value) and "\n" not in str(error.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    resumed = new_trainer()
    assert resume(resumed) == 4
    assert_same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("full_at", ["the weights", "the provenance"])
def test_a_draft_that_cannot_be_saved_leaves_the_old_one(full_at, new_trainer, tmp_path, limits, monkeypatch):
    trainer = new_trainer(save_strategy="no", max_steps=1)
    trainer.save_model()
    (tmp_path / "out" / "notes.txt").write_text("the user's")
    before = contents(tmp_path)
    trainer.saves_at_end = False
    trainer.train()

    def disk_is_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if full_at == "the weights":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    else:
        monkeypatch.setattr(resuming, "write_provenance", disk_is_full)
    with pytest.raises(MSDError, match=r"could not be written: .*What was there before is unchanged"):
        trainer.save_model()
    assert contents(tmp_path) == before


def test_what_a_killed_run_left_is_removed_and_files_of_the_user_stay(new_trainer, tmp_path):
    new_trainer(callbacks=[StopAfter(3)]).train()
    incomplete = tmp_path / "out" / "checkpoint-3"
    (incomplete / ".msd-saving").mkdir(parents=True)
    (incomplete / "model.safetensors").write_text("half of it")
    (incomplete / ".tmpqhJ7Py").write_text("half of another, by safetensors")
    notes = tmp_path / "out" / "checkpoint-1" / "notes.txt"
    notes.parent.mkdir()
    (notes.parent / "config.json").write_text("{}")
    notes.write_text("the user's")
    (tmp_path / "out" / ".msd-saving").mkdir()
    resume(new_trainer())
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_the_command_refuses_another_run_before_it_loads_the_target(new_trainer, tmp_path, run, monkeypatch):
    new_trainer(callbacks=[StopAfter(3)]).train()
    monkeypatch.setattr(script, "load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    argv = [
        "train",
        "--target",
        "t",
        "--text-data",
        "a.json",
        "--curriculum",
        "text",
        "--output-dir",
        tmp_path / "out",
    ]
    code, _, err = run(*argv, "--resume-from-checkpoint", "True", "--report-to", "none")
    assert code == 1 and "curriculum two-stage, this run has text" in " ".join(err.split())
    code, _, err = run(*argv, "--resume-from-checkpoint", "True", "--force", "--report-to", "none")
    assert code == 1 and "--force needs the checkpoint" in " ".join(err.split())


@pytest.fixture
def files(toy_processor, tmp_path):
    build_small_target(toy_processor).save_pretrained(tmp_path / "target")
    toy_processor.save_pretrained(tmp_path / "target")
    write_training_data(tmp_path / "data", 8, seed=0)
    return tmp_path


def command_line(name, folder, output):
    data = folder / "data" / "text.json"
    if name == "train":
        fields = ["--text-data", data, "--curriculum", "text", "--output-dir", output, "--report-to", "none"]
    else:
        fields = ["--data", data, "--output", f"{output}.jsonl" if name == "regenerate" else output]
    return [name, "--target", folder / "target", *fields]


@pytest.mark.parametrize("command", ["train", "extract", "regenerate"])
def test_the_disk_is_checked_before_the_target_is_loaded(command, files, run, monkeypatch):
    monkeypatch.setattr(script, "load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    monkeypatch.setattr(loading, "load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    before = contents(files)
    (files / "note").write_text("the user's")
    code, _, err = run(*command_line(command, files, files / "note" / "output"))
    assert code == 1 and "note' is not a folder" in " ".join(err.split())
    code, _, err = run(*command_line(command, files, "/proc/output"))  # nobody may write there
    assert code == 1 and "Nothing can be written to '/proc" in " ".join(err.split())
    usage = shutil.disk_usage(files)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, _, err = run(*command_line(command, files, files / "output"))
    message = " ".join(err.split())
    assert code == 1 and "has 1.0 kB left" in message and re.search(r"need about [\d.]+ [kM]B", message)
    (files / "note").unlink()
    assert contents(files) == before and not (files / "output").exists()


@pytest.mark.parametrize(
    "more, kept",
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 2}, 5),
        ({"save_steps": 0.25}, 4),
        ({"save_steps": 2, "save_total_limit": 2}, 3),
        ({"save_steps": 100}, 1),
        ({"save_strategy": "epoch"}, 3),
    ],
    ids=str,
)
def test_the_estimate_of_checkpoints_is_what_they_take(
    more, kept, small_target, toy_processor, training_data, tmp_path, monkeypatch
):
    more = {"save_strategy": "steps", **more, "max_steps": 10, "per_device_train_batch_size": 6}
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path, **more)
    needed = []
    monkeypatch.setattr(checkpoint_space, "check_space", lambda folder, num_bytes, *_: needed.append(num_bytes))
    num_parameters = count_parameters(small_target.config, trainer.args)
    assert num_parameters == trainer.model.num_parameters()
    sizes = {kind: len(data) for kind, data in training_data.items()}
    check_checkpoint_space(trainer.args, num_parameters, sizes)
    assert needed == [kept * 12 * num_parameters + 4 * num_parameters]
    if kept != 5:  # training once is enough
        return
    trainer.train()
    trainer.save_model()
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file())
    assert taken == pytest.approx(needed[0], rel=0.2)
    check_checkpoint_space(trainer.args, num_parameters, sizes)
    assert needed[1] == pytest.approx(4 * num_parameters, rel=1.0)  # they are there already


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_an_interrupted_regeneration_or_extraction_says_how_to_go_on(
    number, error, small_target, toy_processor, training_data, tmp_path, monkeypatch, caplog
):
    def interrupted(count, function):
        calls = []

        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == count:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return call

    jobs = {
        "regenerate": lambda: regenerate(
            small_target, toy_processor, training_data["text"], tmp_path / "a.jsonl", max_new_tokens=2, batch_size=2
        ),
        "extract": lambda: extract_features(
            small_target, toy_processor, training_data["text"], tmp_path / "f", max_length=512, samples_per_shard=6
        ),
    }
    before = signal.getsignal(signal.SIGTERM)
    for job, place, count, kept in (
        ("regenerate", (AnswerGenerator, "__call__"), 5, "8 of 24 samples are kept in"),
        ("extract", (FeatureExtractor, "_run"), 3, "2 of 4 shards are kept in"),
    ):
        caplog.clear()
        with monkeypatch.context() as patch, pytest.raises(error) as raised:
            patch.setattr(*place, interrupted(count, getattr(*place)))
            jobs[job]()
        assert error is KeyboardInterrupt or raised.value.code == 143
        assert kept in caplog.text and "the same call goes on there" in caplog.text
        assert signal.getsignal(signal.SIGTERM) == before
        report = jobs[job]()
        assert report.num_samples + sum(report.skipped.values()) == 24


def test_regeneration_on_a_full_disk_keeps_its_lines(small_target, toy_processor, training_data, tmp_path, limits):
    def call(output):
        regenerate(small_target, toy_processor, training_data["text"], output, max_new_tokens=24, batch_size=2)
        return output.read_bytes()

    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    with pytest.raises(MSDError, match=r"a.jsonl.partial' could not be written: .* samples are kept"):
        call(tmp_path / "a.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (tmp_path / ".a.jsonl.123.tmp").write_text("left by a killed run")
    (tmp_path / ".a.jsonl.notes.tmp").write_text("the user's")
    assert call(tmp_path / "a.jsonl") == call(tmp_path / "b.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", ".a.jsonl.notes.tmp"}
