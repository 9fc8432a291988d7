"""`msd-hf tune` finds how a draft's configuration should be read, and changes nothing else."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
from eagle3_fit import fit_eagle3
from golden_drafts import write_checkpoint
from safetensors.torch import load_file
from transformers import BatchFeature

from msd_hf import AutoDraft, Eagle3DraftConfig, Eagle3DraftModel, MSDDraftModel, MSDError, MSDPairingError
from msd_hf.draft import readings
from msd_hf.draft.readings import OtherReadings
from msd_hf.draft.refitted import with_fields
from msd_hf.errors import MSDUnsupportedError
from msd_hf.evaluation.bench_prompts import BenchPrompt
from msd_hf.evaluation.tuning import _search, tune_draft
from msd_hf.loading import load_target_and_processor
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.training_data import write_training_data


def rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


def prompts(number: int, images_at=(2,), num_layers: int = 7) -> list[BenchPrompt]:
    group = "visual" if images_at else "text"
    return [
        BenchPrompt(str(seed), group, lambda seed=seed: BatchFeature(tiny.make_prompt(seed, 6, images_at)))
        for seed in range(number)
    ]


# The search.


class Measured:
    """Stands for measurements: tau is a function of the fields."""

    def __init__(self, tau, **own):
        self.tau, self.own, self.asked = tau, own, []

    def knows(self, fields):
        return {**self.own, **fields} in self.asked

    def __call__(self, fields):
        if not self.knows(fields):
            self.asked.append({**self.own, **fields})
        return self.tau(**{**self.own, **fields})


class Fields:
    def __init__(self, **own):
        self.__dict__.update(own)


def search(tau, choices, **own):
    measure = Measured(tau, **own)
    found = _search(
        measure, Fields(**own), [OtherReadings(name, list(values)) for name, values in choices.items()], tau(**own)
    )
    return (*found, measure.asked)


def test_fields_that_matter_only_together_with_a_later_one_are_found():
    def tau(layers, flag, theta):
        return 1 + 0.2 * (layers == 2) + (layers == 2 and theta == 7) * (1 + (flag is True))

    fields, best, trials, asked = search(
        tau, {"flag": [True], "layers": [1, 2, 3], "theta": [6, 7]}, layers=0, flag=False, theta=5
    )
    assert fields == {"layers": 2, "theta": 7, "flag": True} and best == pytest.approx(3.2)
    assert len(asked) == len({repr(one) for one in asked})  # none is measured twice
    kept = {trial.field: trial.value for trial in trials if trial.is_kept}
    assert kept == fields


def test_ties_and_gains_of_chance_keep_the_present_value():
    fields, best, trials, _ = search(lambda a, b: 2 + 0.03 * a, {"a": [1, -1], "b": [1, 2]}, a=0, b=0)
    assert fields == {} and best == 2
    assert [(trial.field, trial.value) for trial in trials if trial.is_kept] == [("a", 0), ("b", 0)]


def test_of_equally_good_values_the_likeliest_is_taken():
    fields, best, *_ = search(lambda a: [1, 3.0, 3.02, 2.9, 3.01][a], {"a": [1, 2, 3, 4]}, a=0)
    assert fields == {"a": 1} and best == 3.0
    fields, *_ = search(lambda a: [2.97, 3.0, 3.04][a], {"a": [1, 2]}, a=0)
    assert fields == {"a": 2}  # 1 is about as good, but not clearly better than what is there


def test_a_draft_that_is_refused_as_it_is():
    fields, best, *_ = search(lambda a: [0, 1.0, 1.2][a], {"a": [1, 2]}, a=0)
    assert fields == {"a": 2} and best == 1.2


# The values that are tried.


def test_the_readings_of_an_eagle3_draft():
    config = tiny.build_target(num_layers=20).config
    draft = Eagle3DraftConfig.from_target(config, rope_parameters=rope(7e4), check=False)
    choices = {choice.field: choice for choice in draft.other_readings(config, 20)}
    assert list(choices) == [
        "eagle_aux_hidden_state_layer_ids",
        "norm_before_residual",
        "norm_output",
        "rope_parameters",
        "visual_positions",
    ]
    assert choices["eagle_aux_hidden_state_layer_ids"].values == [[3, 11, 18], [1, 9, 16]]
    assert [value["rope_theta"] for value in choices["rope_parameters"].values] == [1e4, 5e5, 1e6, 5e6]
    assert choices["visual_positions"].values == ["placeholder", "pooled", "dropped", "decoupled"]
    draft = Eagle3DraftConfig.from_target(
        config,
        eagle_aux_hidden_state_layer_ids=[4, 20],
        hidden_size=16,
        has_own_embedding=True,
        visual_positions="pooled",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        check=False,
    )
    choices = {choice.field: choice.values for choice in draft.other_readings(config, 20)}
    assert choices["eagle_aux_hidden_state_layer_ids"] == [[3, 19]]
    assert choices["visual_positions"] == ["placeholder", "dropped"]
    assert rope(1e4) in choices["rope_parameters"]


# The same weights under another configuration.


def test_the_weights_stay_and_the_old_draft_too():
    draft = tiny.build_draft(tiny.build_target())
    other = with_fields(draft, rope_parameters=rope(5e5), decouple_visual_tokens=False)
    assert draft.config.decouple_visual_tokens and draft.config.rope_parameters["rope_theta"] == 1e4
    assert other.fc.weight.data_ptr() == draft.fc.weight.data_ptr() and other.dtype == torch.float64
    assert not other.training and other.generation_config.to_dict() == draft.generation_config.to_dict()
    states, embeds = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(with_fields(draft)(embeds, states)[0], draft(embeds, states)[0])
        assert not torch.allclose(other(embeds, states)[0], draft(embeds, states)[0])
    half = with_fields(draft, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and draft.dtype == torch.float64
    assert half.rotary_emb.inv_freq.dtype == torch.float32  # as `from_pretrained` has it
    draft.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(MSDUnsupportedError, match="quantised"):
        with_fields(draft)


# Tuning.


def test_a_draft_that_reads_layers_the_target_lacks_gets_layers_it_has():
    target = tiny.build_target(seed=3, num_layers=7)
    draft = Eagle3DraftModel.from_target(target, eagle_aux_hidden_state_layer_ids=[5, 6, 8])
    result = tune_draft(target, draft, prompts(1, images_at=()), max_new_tokens=4)
    assert result.tau_before == 0 and result.tau >= 1
    assert result.fields["eagle_aux_hidden_state_layer_ids"] in ([4, 5, 7], [2, 3, 4], [3, 4, 5], [1, 2, 3])
    assert result.untried == ["visual_positions"]
    shallow = tiny.build_target(num_layers=2)
    with pytest.raises(MSDPairingError, match="that has 2 layers"):
        tune_draft(shallow, Eagle3DraftModel.from_target(shallow), prompts(1), max_new_tokens=4)
    with pytest.raises(MSDError, match="The answers have one token each"):
        tune_draft(target, draft, prompts(1), max_new_tokens=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a data folder, für Bilder")
    write_training_data(folder, samples=60)
    return folder / "visual.json"


def test_the_command_recovers_a_spoilt_draft(data, run, tmp_path, monkeypatch):
    monkeypatch.setattr(readings, "_THETAS", (1e4,))
    spoilt = {"rope_parameters": rope(1e6), "decouple_visual_tokens": False}
    MSDDraftModel.from_pretrained(DRAFT_DIR, **spoilt).save_pretrained(tmp_path / "spoilt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "spoilt").iterdir()}
    options = ("--target", TARGET_DIR, "--draft", tmp_path / "spoilt", "--data", data, "--max-new-tokens", 24)
    options = (*options, "--num-prompts", 4, "--output")
    code, out, err = run("tune", *options, tmp_path / "tuned")
    assert code == 0, err
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    right = json.loads((DRAFT_DIR / "config.json").read_text())
    assert {name: config[name] for name in spoilt} == {name: right[name] for name in spoilt}
    spoilt_config = json.loads(before["config.json"])
    assert {name: value for name, value in config.items() if name not in spoilt} == {
        name: value for name, value in spoilt_config.items() if name not in spoilt
    }
    own, weights = load_file(DRAFT_DIR / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)
    assert {path.name: path.read_bytes() for path in (tmp_path / "spoilt").iterdir()} == before
    assert "theta 1,000,000" in out and "better" in out and "decouple_visual_tokens=true" in out
    expected = f"next: msd-hf bench --target {TARGET_DIR} --draft {tmp_path / 'tuned'} --data '{data}'"
    assert err.splitlines()[-1] == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"--output": "draft", "--overwrite": None}, "is the folder of --draft, which stays as it is"),
        ({"--output": "taken"}, "exists: choose another name, or add --overwrite"),
        ({"--data": "nothing.json"}, "nothing.json"),
        ({"--draft": "narrow"}, "hidden size 64 does not match the target's 128"),
        ({"--device": "toaster"}, "--device 'toaster' cannot be used"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(options, message, data, run, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr("msd_hf.evaluation.tuning.tune_draft", refuse)
    monkeypatch.chdir(tmp_path)
    for name in ("draft", "taken"):
        MSDDraftModel.from_pretrained(DRAFT_DIR).save_pretrained(name)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    write_checkpoint("eagle3_ckpt_flat_midlayer", tmp_path).rename("narrow")
    run("--version")  # drops the progress bar of `save_pretrained`
    given = {"--target": TARGET_DIR, "--draft": "draft", "--data": data, "--output": "new", **options}
    words = [word for option in given.items() for word in option if word is not None]
    code, _, err = run("tune", *words)
    assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_eagle3_draft_that_was_spoilt_in_three_fields_is_recovered(data, run, tmp_path):
    """Wrong layers (those before), a wrong norm flag and a wrong theta, one by one and at once."""
    target, processor = load_target_and_processor(TARGET_DIR)
    right = {
        "eagle_aux_hidden_state_layer_ids": [2, 10, 17],
        "norm_before_residual": True,
        "rope_parameters": rope(1e4),
    }
    fit_eagle3(target, processor, **right).save_pretrained(tmp_path / "draft")
    wrong = {
        "eagle_aux_hidden_state_layer_ids": [1, 9, 16],
        "norm_before_residual": False,
        "rope_parameters": rope(1e6),
    }
    options = ("--target", TARGET_DIR, "--data", data.with_name("train.json"))
    for number, names in enumerate((*([name] for name in wrong), list(wrong))):
        draft = AutoDraft.from_pretrained(tmp_path / "draft", **{name: wrong[name] for name in names})
        draft.save_pretrained(tmp_path / f"spoilt-{number}")
        folders = ("--draft", tmp_path / f"spoilt-{number}", "--output", tmp_path / f"tuned-{number}")
        code, out, err = run("tune", *options, *folders)
        assert code == 0, err
        config = json.loads((tmp_path / f"tuned-{number}" / "config.json").read_text())
        assert {name: config[name] for name in names} == {name: right[name] for name in names}, out
