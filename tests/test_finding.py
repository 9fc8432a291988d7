"""`MSDDraftModel.find` and `msd-hf drafts` list drafts for a target: of the table, of a folder, and of the Hub."""

import json
import logging

import pytest
from hub_server import hub_in_process
from transformers import LlavaConfig, Qwen2VLConfig

from msd_hf import MSDDraftConfig, MSDDraftModel, MSDError
from msd_hf.hub import finding
from msd_hf.hub.known_drafts import known_drafts
from msd_hf.toy import TARGET_DIR


SEVEN_B = "llava-hf/llava-1.5-7b-hf"


def names(drafts):
    return [draft.name for draft in drafts]


def llava_config(name, hidden_size=4096):
    config = LlavaConfig(text_config={"model_type": "llama", "hidden_size": hidden_size})
    config._name_or_path = name
    return config


def write_draft(folder, target=None, card=None, **fields):
    config = MSDDraftConfig(
        hidden_size=128, num_attention_heads=4, target_model_type="llava", target_text_model_type="llama", **fields
    )
    config.target_name_or_path = target
    config.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)


def test_the_table_names_each_draft_once_with_kind_licence_and_target():
    assert len(set(names(known_drafts()))) == len(known_drafts()) >= 3
    for draft in known_drafts():
        assert draft.name.count("/") == 1 and draft.kind and draft.license and draft.targets
        assert draft.target_model_type and draft.target_text_model_type and draft.hidden_size


def test_an_id_a_configuration_and_nothing_at_all(caplog):
    (draft,) = MSDDraftModel.find(SEVEN_B)
    assert (draft.name, draft.target, draft.is_exact) == ("lucylyn/MSD-LLaVA1.5-7B", SEVEN_B, True)
    assert draft.source == "table" and draft.license == "unknown"
    assert names(MSDDraftModel.find(llava_config("liuhaotian/llava-v1.5-7b"))) == ["lucylyn/MSD-LLaVA1.5-7B"]
    (similar,) = MSDDraftModel.find(llava_config("me/my-llava", 5120))
    assert similar.name == "lucylyn/MSD-LLaVA1.5-13B" and not similar.is_exact
    qwen = Qwen2VLConfig(text_config={"hidden_size": 3584})
    assert names(MSDDraftModel.find(qwen)) == ["lucylyn/MSD-Qwen2VL-7B-Instruct"]
    assert names(MSDDraftModel.find()) == names(known_drafts())


def test_a_folder_of_drafts(tmp_path):
    write_draft(tmp_path / "exact", "target", card="---\nlicense: mit\n---\nText.\n")
    write_draft(tmp_path / "other", "somebody/else", card="---\nlicense: [broken\n---\n")
    write_draft(tmp_path / "unknown")
    (tmp_path / "not a draft").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "a file").write_text("x")
    original = {"model_type": "llava", "hidden_size": 128, "num_hidden_layers": 1}
    for name, fields in {"original": original, "whole model": {**original, "num_hidden_layers": 32}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    drafts = MSDDraftModel.find(TARGET_DIR, folder=tmp_path)
    assert [draft.name.removeprefix(f"{tmp_path}/") for draft in drafts] == ["exact", "original", "other", "unknown"]
    assert [draft.is_exact for draft in drafts] == [True, False, False, False]
    assert [draft.license for draft in drafts] == ["mit", "unknown", "unknown", "unknown"]
    assert names(MSDDraftModel.find(TARGET_DIR, folder=tmp_path / "exact")) == [str(tmp_path / "exact")]


@pytest.mark.parametrize(
    "target, folder, message",
    [
        ("no-such-model", None, "neither a folder nor an id of the Hub"),
        ("a/b/c", None, "neither a folder nor an id"),
        (5000 * "x", None, "neither a folder nor an id"),
        (SEVEN_B, "no such folder", "There is no folder 'no such folder'"),
        (".", None, "no configuration of a target"),
    ],
)
def test_odd_input_is_one_sentence(target, folder, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MSDError, match=message):
        MSDDraftModel.find(target, folder)


def test_without_the_hub_there_is_the_table_with_a_note(monkeypatch, run):
    result = finding.find_drafts(SEVEN_B)
    assert names(result.drafts) == ["lucylyn/MSD-LLaVA1.5-7B"]
    assert any("cannot be reached" in note for note in result.notes)
    assert finding.find_drafts(SEVEN_B, ask_hub=False).notes == [
        note for note in result.notes if "cannot be reached" not in note
    ]
    monkeypatch.setattr(logging.getLogger("msd_hf"), "propagate", True)
    code, out, err = run("drafts", SEVEN_B)
    assert code == 0 and "The Hub cannot be reached" in out, err
    assert out.startswith("draft") and "\nlucylyn/MSD-LLaVA1.5-7B " in out  # a program reads whole names
    assert "next: msd-hf generate --draft lucylyn/MSD-LLaVA1.5-7B --image" in err
    code, out, _ = run("drafts", TARGET_DIR, "--no-hub")
    assert code == 0 and "No draft was found" in out
    code, out, _ = run("drafts")
    assert code == 0 and "Qwen2V" in out


def test_the_hub_is_asked_by_tag(tmp_path, monkeypatch, run):
    for name, target, library in (
        ("me/draft", SEVEN_B, "msd_hf"),
        ("me/finetune", SEVEN_B, "transformers"),
        ("me/other", "someone/else", "msd_hf"),
    ):
        (tmp_path / name).mkdir(parents=True)
        card = f"---\nlibrary_name: {library}\nbase_model: {target}\nlicense: mit\n---\n"
        (tmp_path / name / "README.md").write_text(card)
    with hub_in_process(tmp_path, monkeypatch) as handler:
        drafts = MSDDraftModel.find(SEVEN_B)
        assert [(draft.name, draft.source, draft.license) for draft in drafts] == [
            ("lucylyn/MSD-LLaVA1.5-7B", "table", "unknown"),
            ("me/draft", "Hub", "mit"),
        ]
        assert f"LIST base_model:{SEVEN_B} msd_hf" in handler.requests
        monkeypatch.setattr(finding.HfApi, "list_models", lambda *args, **kwargs: 1 / 0)
        code, out, _ = run("drafts", SEVEN_B)
        assert code == 0 and "could not be asked (ZeroDivisionError)" in out and "MSD-LLaVA1" in out
