"""`save_pretrained(save_experience=True)` keeps what automatic trees have learnt; `from_pretrained` brings it back."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import msd_hf
from msd_hf.decoding.pair import state_of
from msd_hf.errors import MSDCheckpointError
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.tree.experience import Experience
from msd_hf.tree.saved_experience import EXPERIENCE_NAME


@pytest.fixture(scope="module")
def target():
    return LlavaForConditionalGeneration.from_pretrained(TARGET_DIR)


def load_draft(folder=None):
    return msd_hf.MSDDraftModel.from_pretrained(DRAFT_DIR if folder is None else folder)


def ask(target, draft):
    ids = torch.arange(20, 32).unsqueeze(0)
    return target.generate(ids, assistant_model=draft, max_new_tokens=24, do_sample=False, pad_token_id=0)


def experience_of(target, draft) -> Experience:
    (experience,) = state_of(target, draft).experiences.values()
    return experience


@pytest.fixture(scope="module")
def saved(target, tmp_path_factory):
    """A folder with a draft and its experience, and the experience."""
    folder = tmp_path_factory.mktemp("a draft é")
    draft = load_draft()
    for _ in range(3):
        ask(target, draft)
    draft.save_pretrained(folder, save_experience=True)
    return folder, experience_of(target, draft)


def test_a_loaded_draft_starts_warm(target, saved):
    folder, learnt = saved
    draft = load_draft(folder)
    tokens = ask(target, draft)
    warm = experience_of(target, draft)
    assert warm._num_rounds > learnt._num_rounds
    trials = {size: num for size, num in learnt._num_trials[0].items() if num}
    assert all(warm._num_trials[0][size] >= num for size, num in trials.items())  # costs are not explored again
    assert torch.equal(tokens, target.generate(tokens[:, :12], max_new_tokens=24, do_sample=False, pad_token_id=0))


def test_costs_from_a_file_give_way_to_new_ones(saved):
    """Another machine of the same kind may be much slower."""
    _, learnt = saved
    made = Experience(learnt.max_nodes)
    made.load_state(learnt.state())
    assert made.acceptance.state()["seen"] == learnt.acceptance.state()["seen"]
    before = made.seconds_up_to(8)[-1]
    for _ in range(20):
        made.add_verification(8, 1.4 * before)
    assert made.seconds_up_to(8)[-1] > 1.25 * before


def test_nothing_is_saved_unless_asked_for(target, tmp_path):
    draft = load_draft()
    ask(target, draft)
    draft.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / EXPERIENCE_NAME).exists()
    msd_hf.release(draft)
    draft.save_pretrained(tmp_path / "released", save_experience=True)
    assert not (tmp_path / "released" / EXPERIENCE_NAME).exists() and (tmp_path / "released/config.json").exists()


def test_experience_of_another_device_is_left_aside(target, saved, tmp_path):
    folder, _ = saved
    copied = tmp_path / "copy"
    load_draft(folder).save_pretrained(copied, save_experience=True)
    fields = json.loads((copied / EXPERIENCE_NAME).read_text())
    assert fields["experiences"]  # experience that was read is saved again
    for entry in fields["experiences"]:
        entry["circumstances"]["device"] = "another"
    (copied / EXPERIENCE_NAME).write_text(json.dumps(fields))
    draft = load_draft(copied)
    ask(target, draft)
    assert experience_of(target, draft)._num_rounds < 24


def test_the_file_of_another_release_is_left_aside(saved, tmp_path):
    load_draft(saved[0]).save_pretrained(tmp_path)
    (tmp_path / EXPERIENCE_NAME).write_text('{"format": 99, "anything": 1}')
    load_draft(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry["measured"]["acceptance"]["seen"][0].pop(),
        lambda entry: entry["measured"]["rows"]["0"]["plain_costs"].update({"0": [float("nan"), 1.0]}),
        lambda entry: entry["measured"]["rows"]["0"].update(whole_rounds=[[1, 1]]),
        lambda entry: entry["measured"]["rows"].update({"999": entry["measured"]["rows"]["0"]}),
        lambda entry: entry["settings"].update(num_nodes=-1),
        lambda entry: entry["circumstances"].update(host="x"),
        lambda entry: entry.clear(),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(saved, tmp_path, damage):
    folder, _ = saved
    load_draft(folder).save_pretrained(tmp_path)
    fields = json.loads((folder / EXPERIENCE_NAME).read_text())
    damage(fields["experiences"][0])
    (tmp_path / EXPERIENCE_NAME).write_text(json.dumps(fields))
    with pytest.raises(MSDCheckpointError, match=r"experience\.json' is not (the experience of a draft|a JSON file)"):
        load_draft(tmp_path)


def test_the_file_names_no_machine_and_no_path(saved):
    text = (saved[0] / EXPERIENCE_NAME).read_text()
    assert platform.node() not in text and "/" not in text and len(text) < 2**16
