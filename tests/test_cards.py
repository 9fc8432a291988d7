"""Cards of drafts: what they say, what runs, what stays, and the figures that a benchmark writes into them."""

import json
import os
import re
import shutil

import pytest
from hub_server import hub_in_process, metadata_errors
from huggingface_hub import EvalResult, ModelCard
from training_runs import make_trainer

from msd_hf import MSDDraftModel, MSDError
from msd_hf.hub.card import MARK, make_card, update_results, write_card
from msd_hf.hub.measured import results_of_bench
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.training_data import write_training_data


def snippet(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled draft, which says whose draft it is."""
    folder = tmp_path / "ein Entwurf ü"
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.config.target_name_or_path = "someone/toy-llava"
    draft.save_pretrained(folder)
    shutil.copy(DRAFT_DIR / "training_provenance.json", folder)
    return folder


RESULT = EvalResult("image-text-to-text", "data", "data, visual", "tau", 3.5, dataset_config="visual")


def test_the_card_has_what_the_hub_reads(folder):
    path = write_card(folder, "me/draft", license="apache-2.0", language=["en", "de"])
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("msd_hf", "image-text-to-text")
    assert (data["base_model"], data["base_model_relation"]) == ("someone/toy-llava", "adapter")
    assert {"speculative-decoding", "msd", "msd_hf"} <= set(data["tags"])
    assert (data["license"], data["language"]) == ("apache-2.0", ["en", "de"])
    assert "model-index" not in data and "not measured" in card.text
    for text in ("import msd_hf", "pip install", "recommended", "1200", "2,000", "transformers 5.23.0"):
        assert text in card.text
    assert "AutoModel.from_pretrained` alone does not know" in card.text


def test_the_usage_runs_as_it_stands(folder, tmp_path, monkeypatch, capsys):
    """The folder `someone/toy-llava` stands for the repository of this name."""
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "toy-llava").symlink_to(TARGET_DIR)
    monkeypatch.chdir(tmp_path)
    lines = snippet(write_card(folder).read_text())
    assert len(lines.splitlines()) <= 15
    exec(compile(lines, "card", "exec"), {})
    answer = capsys.readouterr().out.strip().splitlines()[-1]
    assert "cross" in answer and answer.endswith(".")


def test_a_card_without_record_target_or_licence_says_so(tmp_path):
    MSDDraftModel.from_pretrained(DRAFT_DIR).save_pretrained(tmp_path / "draft")
    card = make_card(tmp_path / "draft")
    data = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "language"} & data.keys()
    for text in ("Not recorded", "was not recorded", "NAME-OF-THE-TARGET", "not stated", "not measured"):
        assert text in card.text


def test_a_page_of_another_project_is_no_card(tmp_path):
    (tmp_path / "README.md").write_text("# A project\n")
    with pytest.raises(MSDError, match="does not hold a draft"):
        write_card(tmp_path)


@pytest.mark.parametrize(
    "record, shown",
    [
        ({"data": 5, "versions": ["a"], "metrics": [1]}, []),
        ({"data": {"skipped": [1], "text": "many"}}, ["many"]),
        ({"data": {"skipped": {"no image": "some", "broken": 2}, "text": 3000}}, ["| skipped samples | 2 |", "3,000"]),
    ],
    ids=["other kinds", "a word", "a word among numbers"],
)
def test_an_edited_record_makes_a_card(record, shown, folder):
    (folder / "training_provenance.json").write_text(json.dumps(record))
    (folder / "README.md").write_text(f"---\ntags:\n- mine\n- 5\n- a: b\n---\n<!-- {MARK} -->\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "draft_vocab_size": "few"}))
    card = make_card(folder)
    assert card.data.tags == ["speculative-decoding", "msd", "msd_hf", "mine"] and "few of the target's" in card.text
    assert all(text in card.text for text in shown)


def test_a_text_target_gets_the_lines_for_text(tmp_path):
    fields = {"model_type": "msd_draft", "target_model_type": "llama", "target_text_model_type": "llama"}
    fields |= {"target_name_or_path": "me/llama", "num_hidden_layers": 1, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    card = make_card(tmp_path)
    assert card.data.pipeline_tag == "text-generation" and "AutoModelForCausalLM" in snippet(card.text)
    compile(snippet(card.text), "card", "exec")


def test_an_edited_card_is_never_replaced_unasked(folder, run):
    code, out, err = run("card", folder, "--license", "mit")
    assert code == 0 and "next: msd-hf bench --update-card" in err, out
    path = folder / "README.md"
    assert run("card", folder)[0] == 0  # not edited
    assert ModelCard.load(path).data.license == "mit"  # what was given before stays
    path.write_text(path.read_text().replace(MARK, "") + "\nMy own words.\n")
    before = path.read_text()
    code, _, err = run("card", folder)
    assert code == 1 and "--overwrite" in err and err.count("\n") == 1 and path.read_text() == before
    assert run("card", folder, "--overwrite")[0] == 0 and "My own words" not in path.read_text()


@pytest.mark.parametrize("case", ["no folder", "no draft", "broken record", "card is no text", "broken metadata"])
def test_bad_folders_give_one_sentence(case, folder, run):
    if case == "no folder":
        folder = folder / "none"
    elif case == "no draft":
        folder = TARGET_DIR
    elif case == "broken record":
        (folder / "training_provenance.json").write_text("{")
    elif case == "card is no text":
        (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    else:
        (folder / "README.md").write_text(f"---\nlicense: [\n---\n<!-- {MARK} -->\n")
    code, _, err = run("card", folder)
    assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="a folder is never read-only for the superuser")
def test_a_read_only_folder_is_refused(folder, run):
    folder.chmod(0o500)
    assert "cannot be written" in run("card", folder)[2]


def test_fields_of_a_configuration_cannot_break_out_of_the_card(folder):
    config = json.loads((folder / "config.json").read_text())
    config["target_name_or_path"] = 'x|y\n---\n<script> "`'
    (folder / "config.json").write_text(json.dumps(config))
    card = make_card(folder, 'a"b\n---\nlicense: evil')
    assert "license" not in card.data.to_dict() and "<script>" not in card.text.replace(snippet(card.text), "")
    compile(snippet(card.text), "card", "exec")


def test_figures_of_a_benchmark_go_into_the_card(folder, run, tmp_path, monkeypatch):
    write_training_data(tmp_path / "data", 4, seed=0)
    write_card(folder, license="mit")
    data = ("--data", tmp_path / "data" / "visual.json", "--target", TARGET_DIR)
    few = ("--num-prompts", 1, "--repeats", 1, "--max-new-tokens", 4)
    code, out, err = run("bench", "--update-card", folder, *data, *few)
    assert code == 0 and "README.md" in out, err
    card = ModelCard.load(folder / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"tau", "speedup", "identical"}
    assert results["tau"].metric_value >= 1 and results["tau"].dataset_name.startswith("visual, ")
    how = results["tau"].dataset_args
    assert how["num_prompts"] == 1 and how["command"].startswith("msd-hf bench --update-card")
    assert "torch" in how["versions"] and "thread" in how["hardware"]
    assert how["command"] in card.text and "not measured. `msd-hf bench" not in card.text
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert card.data.license == "mit"
    write_card(folder)  # figures are kept
    assert [r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results] == [
        r.metric_value for r in card.data.eval_results
    ]
    with hub_in_process(tmp_path, monkeypatch):
        card = ModelCard.load(folder / "README.md")
        assert metadata_errors(card) == []
        card.data.base_model_relation = "draft"
        assert metadata_errors(card) == ["base_model_relation is not allowed"]


def test_figures_go_into_an_edited_card_and_all_words_stay(folder):
    path = folder / "README.md"
    path.write_text("---\nlicense: mit\nmine: 7\n---\n# My draft\n\nMy own words.\n")
    for value in (2.0, 3.0):
        update_results(folder, [EvalResult(**{**vars(RESULT), "metric_value": value})])
    card = ModelCard.load(path)
    assert card.data.eval_results[0].metric_value == 3.0 and card.data.to_dict()["mine"] == 7
    assert "My own words." in card.text and card.text.count("## Measured") == 1 and "| 3.00 |" in card.text


@pytest.mark.parametrize("case", ["no draft", "broken card", "shape"])
def test_a_card_is_checked_before_the_measurement(case, folder, run, monkeypatch):
    monkeypatch.setattr("msd_hf.loading.load_target", lambda *args, **kwargs: pytest.fail("the target was loaded"))
    if case == "broken card":
        (folder / "README.md").write_text("---\nlicense: [\n---\n")
    arguments = ("--shape", "llava-1.5-7b") if case == "shape" else ("--toy",)
    code, _, err = run("bench", *arguments, "--update-card", TARGET_DIR if case == "no draft" else folder)
    assert code == 1 and err.count("\n") == 1


def test_figures_that_were_not_measured_are_left_out():
    report = {
        "environment": {"command": "msd-hf bench", "device": "CPU", "threads": 2, "dtype": "float32", "versions": {}},
        "num_prompts": 2,
        "groups": {},
        "methods": {"tree": {"tau": float("nan"), "speedup": {"median": 1.5}, "identical_share": 1.0}},
    }
    assert [result.metric_type for result in results_of_bench(report, "my data")] == ["speedup", "identical"]


def test_the_trainer_writes_a_card_and_keeps_an_edited_one(small_target, toy_processor, training_data, tmp_path):
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path / "run")
    with pytest.raises(MSDError, match="does not hold a draft"):
        trainer.create_model_card()
    trainer._metrics["eval_tau_visual"] = 2.5
    trainer.save_model()
    trainer.create_model_card(license="mit", language="en", tags="mine")
    path = tmp_path / "run" / "README.md"
    card = ModelCard.load(path)
    assert card.data.license == "mit" and "mine" in card.data.tags and card.data.library_name == "msd_hf"
    assert "visual 2.50" in card.text and '"run"' in snippet(card.text)
    path.write_text("My own words.\n")
    trainer.create_model_card()
    assert path.read_text() == "My own words.\n"


def test_convert_and_draft_vocab_keep_card_and_record(folder, run, tmp_path):
    write_card(folder, license="mit", results=[RESULT])
    write_training_data(tmp_path / "data", 4, seed=0)
    vocabulary = ("--target", TARGET_DIR, "--data", tmp_path / "data" / "text.json", "--size", 100)
    code, _, err = run("draft-vocab", "--draft", folder, "--output", tmp_path / "small", *vocabulary)
    assert code == 0, err
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.license == "mit" and "100 of the target's 512 tokens" in card.text
    assert card.data.eval_results is None and "not measured" in card.text  # they were of another draft
    record = (tmp_path / "small" / "training_provenance.json").read_text()
    assert record == (folder / "training_provenance.json").read_text()

    (folder / "README.md").write_text("---\nlicense: other\n---\nThe author's words.\n")
    for _ in range(2):  # a card that was copied does not stand in the way of --overwrite
        code, _, err = run("convert", folder, tmp_path / "converted", "--overwrite")
        assert code == 0, err
    text = (tmp_path / "converted" / "README.md").read_text()
    assert "The author's words." in text and ModelCard(text).data.license == "other"
    assert (tmp_path / "converted" / "training_provenance.json").exists()
