"""lmms-eval with a draft: the same scores, a record of each call. Tests marked `lmms_eval` run lmms-eval itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import build_draft, build_target, make_prompt

from msd_hf.engines.lmms_eval.manifests import CHAT_CLASSES, SIMPLE_CLASSES, model_manifests
from msd_hf.engines.lmms_eval.presets import PRESETS, find_preset
from msd_hf.engines.lmms_eval.recorded_generate import RecordedGenerate
from msd_hf.errors import MSDError
from msd_hf.evaluation.lmms_results import read_runs
from msd_hf.evaluation.lmms_table import compare_runs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


ROOT = Path(__file__).parents[1]
TASK = ROOT / "examples" / "engines" / "lmms_eval_toy"
FOLDER = ROOT / "msd_hf" / "engines" / "lmms_eval"
PYTHON = "MSD_HF_LMMS_PYTHON"


def run(folder, *command):
    """Runs a Python command in the environment of lmms-eval, offline; returns what it printed."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no Python with lmms-eval: examples/engines/lmms_eval_toy.sh makes one")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [python, *command], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    return done.stdout + done.stderr


def evaluate(folder, arguments, *options, model="msd_llava", questions=8):
    """Runs the task of the toy world."""
    if not (folder / "toy_world_data").exists():
        run(folder, str(TASK / "make_data.py"), "toy_world_data", str(questions))
    task = ("--tasks", "toy_world", "--include_path", str(TASK), "--output_path", "results", "--log_samples")
    return run(folder, "-m", "lmms_eval", "--model", model, "--model_args", arguments, *task, *options)


def compared(folder):
    (comparison,) = compare_runs(read_runs([folder / "results"]))
    return comparison


@pytest.mark.lmms_eval
@pytest.mark.parametrize("preset", [None, "paper"])
def test_scores_and_answers_are_those_of_the_target_alone(tmp_path, preset):
    arguments = f"pretrained={TARGET_DIR}" + (f",preset={preset}" if preset else "")
    for given in (arguments, f"{arguments},draft={DRAFT_DIR}"):
        printed = evaluate(tmp_path, given)
    comparison = compared(tmp_path)
    scores = list(comparison.scores())
    assert len(scores) == 2 and all(before == after for _, before, after in scores), printed
    assert comparison.same_answers() == "8/8" and comparison.notes() == []
    assert comparison.tau() > (3 if preset is None else 1)
    assert comparison.speedup("seconds") > 0 and comparison.speedup("evaluation_seconds") > 0
    for sample in comparison.recorded():  # the first token of an answer is that of the prefill
        assert sample["output_tokens"] == round(sample["tau"] * sample["rounds"]) + 1
        assert 0 < sample["seconds"] < sample["evaluation_seconds"]


@pytest.mark.lmms_eval
def test_the_preset_asks_for_a_detailed_explanation(tmp_path):
    lengths = []
    for preset in "", ",preset=paper":
        evaluate(tmp_path, f"pretrained={TARGET_DIR},draft={DRAFT_DIR}{preset}", questions=1)
    for run_ in read_runs([tmp_path / "results"]):
        (sample,) = run_.samples["toy_world"]
        lengths.append(sample.counts["input_tokens"])
    assert lengths[1] > lengths[0] + 10


@pytest.mark.lmms_eval
@pytest.mark.parametrize(
    ("arguments", "options", "questions", "sentence"),
    [
        (f"pretrained={TARGET_DIR},preset=paper", (), 101, "add --limit 100"),
        (f"pretrained={TARGET_DIR},draft={DRAFT_DIR}", ("--gen_kwargs", "num_beams=2"), 2, "num_beams"),
        (f"pretrained={TARGET_DIR},preset=papers", (), 1, "`preset` 'papers' is not known"),
        (f"pretrained={TARGET_DIR},draft={DRAFT_DIR}", ("--batch_size", "2"), 1, "use --batch_size 1"),
        (f"pretrained={TARGET_DIR},draft={TARGET_DIR}", (), 1, "no MSD draft"),
    ],
    ids=["too many samples", "beam search", "unknown preset", "a batch", "no draft"],
)
def test_what_cannot_be_evaluated_is_refused_and_leaves_no_scores(tmp_path, arguments, options, questions, sentence):
    assert sentence in evaluate(tmp_path, arguments, *options, questions=questions)
    assert not (tmp_path / "results").exists()


@pytest.mark.lmms_eval
@pytest.mark.parametrize(
    ("kind", "model"), [("Qwen2VL", "msd_qwen2_vl"), ("Qwen2_5_VL", "msd_qwen2_5_vl"), ("Qwen3VL", "msd_qwen3_vl")]
)
def test_qwen_targets_answer_the_same(tmp_path, kind, model):
    if "ok" not in run(tmp_path, "-c", "import torchvision, qwen_vl_utils; print('ok')"):
        pytest.skip("the environment of lmms-eval has no torchvision that loads beside its torch")
    run(tmp_path, str(ROOT / "tests" / "lmms_qwen_target.py"), kind, str(tmp_path))
    for draft in "", ",draft=draft":
        printed = evaluate(
            tmp_path, f"pretrained=target{draft}", "--gen_kwargs", "max_new_tokens=12", model=model, questions=2
        )
    comparison = compared(tmp_path)
    assert comparison.same_answers() == "2/2", printed
    assert comparison.tau() >= 1 and comparison.notes() == []


def test_each_call_is_recorded_and_the_tokens_stay():
    target = build_target()
    draft = build_draft(target)
    prompt = make_prompt(0, 6, (2,))
    arguments = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None}
    alone = target.generate(**prompt, **arguments)
    calls = []
    for given in None, draft:
        generate = RecordedGenerate(target, given)
        generate.on_call = calls.append
        assert torch.equal(generate(**prompt, **arguments), alone)
    for call in calls:
        assert (call.input_tokens, call.output_tokens) == (prompt["input_ids"].shape[1], 12) and call.seconds > 0
    assert calls[0].rounds is None and calls[0].tau is None
    assert calls[1].rounds * calls[1].tau == 11  # and the token of the prefill


def test_a_refused_call_is_kept_for_the_model_class_which_lmms_eval_hides_errors_from():
    target = build_target()
    generate = RecordedGenerate(target, build_draft(target))
    with pytest.raises(MSDError, match="num_beams") as caught:
        generate(**make_prompt(0, 6), max_new_tokens=4, num_beams=2)
    assert generate.refusal is caught.value


def test_the_preset_replaces_the_instruction_of_the_task():
    preset = PRESETS["paper"]
    assert (
        preset.question("What is it?\nAnswer with one word.", "\nAnswer with one word. ")
        == "What is it?" + preset.request
    )
    assert preset.question("What is it? ", "Answer with one word.") == "What is it?" + preset.request
    assert preset.question("What is it?", "") == "What is it?" + preset.request


def test_the_preset_asks_in_the_last_text_of_the_user_and_drops_the_system_prompt():
    def message(role, *texts):
        return {"role": role, "content": [{"type": "image", "url": 1}, *({"type": "text", "text": t} for t in texts)]}

    messages = [message("system", "Be short."), message("user", "A?", "B?"), message("assistant", "C.")]
    asked = PRESETS["paper"].messages(messages, "")
    assert [entry["role"] for entry in asked] == ["user", "assistant"]
    texts = [part.get("text") for part in asked[0]["content"]]
    assert texts == [None, "A?", "B?" + PRESETS["paper"].request] and asked[1] == messages[2]
    assert messages[1]["content"][2]["text"] == "B?"  # the task's own messages stay
    assert PRESETS["paper"].messages([message("user")], "") == [message("user")]


def test_samples_that_a_preset_leaves_out_and_unknown_presets_are_refused():
    PRESETS["paper"].check_samples(99)
    with pytest.raises(MSDError, match="--limit 100"):
        PRESETS["paper"].check_samples(100)
    assert find_preset(None) is None and find_preset("paper") is PRESETS["paper"]
    with pytest.raises(MSDError, match="'other' is not known: use paper"):
        find_preset("other")


def test_the_entry_point_names_classes_that_are_there():
    classes = {**CHAT_CLASSES, **SIMPLE_CLASSES}
    for path in classes.values():
        module, _, name = path.partition(".")
        assert f"class {name}(WithDraft, " in (FOLDER / f"{module}.py").read_text(encoding="utf-8")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        f'[project.entry-points."lmms_eval.models"]\nmsd_hf = "{model_manifests.__module__}:model_manifests"' in text
    )


def test_a_missing_lmms_eval_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", None)
    with pytest.raises(MSDError, match=r'pip install "msd-hf\[lmms-eval\]"'):
        model_manifests()
