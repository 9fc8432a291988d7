"""The scripts of `examples/` as the pages show them, with the bundled pair; and the studies of memory and of calls."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from msd_hf import cli
from msd_hf.images import read_image
from msd_hf.prompts import build_inputs
from msd_hf.toy import DEMO_IMAGE, TARGET_DIR
from msd_hf.toy.training_data import write_training_data


EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURE, COUNT = "What is in the picture?", "Count from 5 to 12."


@pytest.fixture
def run(monkeypatch, capsys):
    def run_example(name: str, *arguments: str, typed: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def answers(toy_processor):
    """The answers of the target alone."""
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR)

    def answer(question: str, image) -> str:
        inputs = build_inputs(toy_processor, question, image)
        ids = target.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
        return toy_processor.decode(ids, skip_special_tokens=True).strip()

    return {PICTURE: answer(PICTURE, read_image(DEMO_IMAGE)), COUNT: answer(COUNT, None)}


def test_the_training_of_the_readme(tmp_path, monkeypatch, capsys):
    """As it stands, with the bundled target and a few samples of the toy world: train, use, measure."""
    text = (EXAMPLES.parent / "README.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "MSDTrainer(" in block)
    command = next(line for line in text.splitlines() if line.startswith("msd-hf bench --target"))
    monkeypatch.chdir(tmp_path)
    write_training_data(tmp_path / "images", samples=12)
    for kind, name in (("text", "sharegpt"), ("visual", "llava_mix")):
        (tmp_path / "images" / f"{kind}.json").rename(f"{name}.json")
    shutil.copy(DEMO_IMAGE, "photo.jpg")
    snippet = snippet.replace("llava-hf/llava-1.5-7b-hf", str(TARGET_DIR))
    fast = 'recipe="recommended", max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to="none"'
    exec(compile(snippet.replace('recipe="recommended"', fast), "README.md", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.strip().splitlines()[-1]) > 20
    arguments = shlex.split(command, comments=True)[1:]
    arguments[arguments.index("llava-hf/llava-1.5-7b-hf")] = str(TARGET_DIR)
    monkeypatch.setattr(sys, "argv", ["msd-hf", *arguments, "--num-prompts", "1", "--repeats", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "tau" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["batch.py", "chat.py", "generate_image.py"])
def test_scripts_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


def test_generate_image(run, answers):
    answer, figures = run("generate_image.py").splitlines()
    assert answer.strip() == answers[PICTURE]
    num_tokens, num_forwards = (int(word) for word in figures.split() if word.isdigit())
    assert num_tokens > 2 * num_forwards


def test_batch(run, answers):
    """The batch holds a prompt with a picture and a shorter one without."""
    printed = run("batch.py", "--questions", PICTURE, COUNT, "--images", str(DEMO_IMAGE), "none")
    blocks = [block.splitlines() for block in printed.strip().split("\n\n")]
    assert [block[:2] for block in blocks] == [[question, answers[question]] for question in (PICTURE, COUNT)]


def test_chat(run, answers):
    """The first answer is the target's. Questions from standard input and from `--say` get the same answers."""
    asked = [PICTURE, "How many objects are there?"]
    printed = run("chat.py", "--image", str(DEMO_IMAGE), "--say", *asked).splitlines()
    assert printed[0].strip() == answers[PICTURE] and len(printed) == 2
    assert run("chat.py", "--image", str(DEMO_IMAGE), typed="\n".join(asked)).splitlines() == printed
    assert run("chat.py", "--say", COUNT).strip() == answers[COUNT]


MEMORY_SHAPE = "--hidden 128 --heads 4 --intermediate 352 --layers 8 --vocabulary 1000 --context 600"


@pytest.mark.parametrize("limit", [0, 300])
def test_draft_and_tree_take_no_more_memory_than_allowed(run, limit):
    """With `--limit 300` the answer ends long before the length limit of the call."""
    printed = run("studies/bench_memory.py", *MEMORY_SHAPE.split(), "--new-tokens", "12", "--limit", str(limit))
    figures = {
        name: float(value)
        for line in printed.splitlines()
        if line.startswith("│")
        for name, value in [(cell.strip() for cell in line.strip("│").split("│"))]
    }
    assert figures["its keys and values"] == pytest.approx(2 * 128 * 4 * 612 / 1e6, abs=0.01)
    assert figures["64 slots of the target"] == pytest.approx(2 * 8 * 128 * 4 * 64 / 1e6, abs=0.01)
    added = figures["with the draft and its weights"] - figures["`generate` alone"]
    assert figures["added"] == pytest.approx(added, abs=0.011) and added > figures["the draft's weights"]
    assert added < 1.1 * figures["allowed"]
    assert "same tokens       yes" in printed


def test_peak_memory_counts_what_is_held_at_one_time():
    example = runpy.run_path(str(EXAMPLES / "studies" / "bench_memory.py"))
    before = torch.ones(1000)

    def function():
        for _ in range(3):
            held = torch.ones(1000)
        del held
        return (before + 1) * 2

    peak, result = example["peak_bytes"](function, torch.device("cpu"))
    assert peak == pytest.approx(8000, abs=200) and result[0] == 4


STEP_SHAPE = "--hidden 64 --heads 4 --intermediate 176 --vocabulary 500 --passes 2 --lengths 3000 --measured True"


def test_a_long_training_step_is_measured(run, monkeypatch):
    """With a budget of visual rows it has fewer rows to compute and to hold."""
    monkeypatch.syspath_prepend(EXAMPLES / "studies")
    few, everything = (
        json.loads(run("studies/bench_long_training.py", *STEP_SHAPE.split(), *more))
        for more in (["--max_visual_rows", "16"], [])
    )
    assert 0 < few["seconds"] < everything["seconds"]
    assert few["bytes"] < 0.5 * everything["bytes"]


RUN_EACH = """
import runpy, sys

script, *commands = sys.argv[1:]
for command in commands:
    sys.argv[1:] = command.split()
    try:
        runpy.run_path(script, run_name="__main__")
        print("status 0")
    except SystemExit as end:
        print("status", end.code)
"""


def test_recorded_calls_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run_script(*commands: str) -> list[str]:
        """What each command prints. They run in a process of their own: the script has modules beside it, and
        settings that other tests are not to have."""
        studies = EXAMPLES / "studies"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(studies), *sys.path])}
        command = [sys.executable, "-c", RUN_EACH, str(studies / "record_calls.py"), *commands]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 0, result.stderr
        return re.findall(r"(.*?status \d+)\n", result.stdout, re.DOTALL)

    (printed,) = run_script("record calls.pt --calls 4")
    assert printed.endswith("4 calls recorded\nstatus 0")

    recording = torch.load("calls.pt", weights_only=True)
    name, tokens = next(item for item in recording["outcomes"][2].items() if item[0].endswith("sequences"))
    tokens[0, -1] += 1
    torch.save(recording, "changed.pt")
    same, other = run_script("compare calls.pt", "compare changed.pt")
    assert same.endswith("4 of 4 calls as recorded\nstatus 0")
    assert other.endswith("3 of 4 calls as recorded\nstatus 1")
    assert "call 2: {" in other and f"{name}: 1 of {tokens.numel()} differ" in other


def test_every_fault_of_the_study_has_its_place_in_the_code():
    """A fault whose text is gone would be skipped in silence when the code changes."""
    study = runpy.run_path(str(EXAMPLES / "studies" / "faults.py"))
    package = EXAMPLES.parent / "msd_hf"
    for fault in (fault for group in study["FAULTS"].values() for fault in group):
        assert (package / fault.file).read_text().count(fault.old) == 1, fault.name
        assert fault.new != fault.old
