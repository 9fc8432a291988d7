"""
The code in README and the pages runs as it is written, with the bundled pair in place of published models, small data
in place of large files, and few steps.

`SHARING.md` runs from top to bottom in `test_sharing_page.py`, and `SERVING.md` in `test_serving.py`, against servers.
A command that takes minutes or needs a GPU is read only: its options must exist. `-m slow` runs those of a minute.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import typer.main
from pages import PAGES, ROOT, blocks, commands
from PIL import Image
from transformers import AutoModelForImageTextToText

import msd_hf
from msd_hf import cli
from msd_hf.engines.lmms_eval.manifests import CHAT_CLASSES, SIMPLE_CLASSES
from msd_hf.images import read_image
from msd_hf.prompts import build_inputs
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR
from msd_hf.toy.training_data import write_training_data


NAMES = {
    "llava-hf/llava-1.5-7b-hf": str(TARGET_DIR),
    "lucylyn/MSD-LLaVA1.5-7B": str(DRAFT_DIR),
    '"cuda"': '"cpu"',
    "MSDTrainingArguments(": "MSDTrainingArguments(max_steps=1, per_device_train_batch_size=1, use_cpu=True, "
    "report_to='none', disable_tqdm=True, ",
}
# Placeholders of commands, and options that make a command short. The last of two equal options counts.
WORDS = {"T": str(TARGET_DIR), "D": str(DRAFT_DIR), "stranger/target": str(TARGET_DIR)}
SHORT = {
    "msd-hf demo": "--repeats 1 --max-new-tokens 4",
    "msd-hf generate": "--max-new-tokens 4 --dtype float32",
    "msd-hf bench": "--num-prompts 1 --repeats 1 --max-new-tokens 8 --min-answer-tokens 1",
    "msd-hf tune": "--num-prompts 1 --max-new-tokens 4",
    "msd-hf train": "--max-steps 1 --per-device-train-batch-size 1 --eval-samples 1 --eval-prompts 1 "
    "--eval-max-new-tokens 2 --report-to none --use-cpu True --save-strategy no --max-length 256",
    "python -m msd_hf.toy.training_data": "--samples 20",
    "python -m msd_hf.toy.evaluate": "--prompts-per-kind 1 --repeats 1 --max-new-tokens 4",
    "python -m msd_hf.toy.agreement": "--generations 2",
}
# Commands that are read only, by a part of them: they take long, need a GPU or change the checkout.
LONG = ("--shape", "--baseline compiled", "--hard", "toy.build", "toy.hard.build", "toy.stranger")
LONG = (*LONG, "examples/studies/", "accelerate launch", "pip")
LONG = (*LONG, "...", "report/report.json", "pytest", "features/", "lmms-eval", "examples/engines/", "vllm serve")
LONG = (*LONG, "msd-hf serve")
# These run with `-m slow`: a quicker command of the same kind runs always.
SLOW = ("msd-hf bench", "toy.evaluate", "toy.agreement", "stranger/data", "--max-steps 100", "toy/")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the files that the pages name, at the places that they name."""
    folder = tmp_path_factory.mktemp("world")
    write_training_data(folder / "toy-data", 20, seed=0)
    shutil.copytree(folder / "toy-data", folder / "stranger" / "data")
    shutil.copytree(folder / "toy-data", folder / "toy")
    shutil.copytree(folder / "toy-data" / "images", folder / "images")
    for name, source in (("sharegpt", "text"), ("llava_mix", "visual"), ("prompts", "test")):
        text = (folder / "toy-data" / f"{source}.json").read_text().replace("images/", "")
        (folder / f"{name}.json").write_text(text)
    Image.open(DEMO_IMAGE).convert("RGB").save(folder / "photo.jpg")
    (folder / "msd_hf").symlink_to(ROOT / "msd_hf")
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR)
    draft = msd_hf.Eagle3DraftModel.from_target(target, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    draft.save_pretrained(folder / "some" / "eagle3-draft")
    return folder


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


@pytest.fixture(scope="module")
def given(toy_processor):
    """What a fragment takes as given."""
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR)
    inputs = build_inputs(toy_processor, "What is in the picture?", read_image(DEMO_IMAGE))
    return {
        "target": target,
        "llava": target,
        "inputs": inputs,
        "msd_hf": msd_hf,
        "draft": msd_hf.MSDDraftModel.from_pretrained(DRAFT_DIR),
    }


def python_snippets():
    return [
        pytest.param(code, id=f"{path.name}-{number}")
        for path in PAGES
        if path.name not in ("SHARING.md", "SERVING.md")
        for number, code in enumerate(blocks(path, "python"))
    ]


@pytest.mark.parametrize("code", python_snippets())
def test_python(code, inside, given):
    for name, replacement in NAMES.items():
        code = code.replace(name, replacement)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "snippet", "exec"), dict(given))


@pytest.mark.parametrize("owner", [msd_hf.MSDDraftModel, msd_hf.MSDDraftConfig, msd_hf.Eagle3DraftModel])
def test_examples_of_docstrings(owner, given, inside):
    (example,) = (
        found for found in doctest.DocTestFinder(recurse=False).find(owner, owner.__name__) if found.examples
    )
    for line in example.examples:
        source = line.source
        for name, replacement in NAMES.items():
            source = source.replace(name, replacement)
        exec(source, dict(given, MSDDraftModel=msd_hf.MSDDraftModel, MSDDraftConfig=msd_hf.MSDDraftConfig))


SHARED = {command for path in PAGES if path.name == "SHARING.md" for command in commands(path)}
ALL_COMMANDS = sorted({command for path in PAGES for command in commands(path)})


def kind_of(command):
    """The words by which `SHORT` knows a command."""
    words = re.sub(r"^OMP_NUM_THREADS=1 ", "", command).split()
    return " ".join(words[:3] if words[0] == "python" else words[:2])


def quick_commands():
    for command in ALL_COMMANDS:
        if not any(part in command for part in LONG) and command not in SHARED:
            yield pytest.param(command, marks=pytest.mark.slow if any(part in command for part in SLOW) else ())


@pytest.mark.parametrize("command", quick_commands())
def test_command(command, inside, monkeypatch, run):
    arguments = [WORDS.get(word, word) for word in shlex.split(command)] + shlex.split(SHORT.get(kind_of(command), ""))
    for name, replacement in NAMES.items():
        arguments = [word.replace(name, replacement) for word in arguments]
    if arguments[0] == "msd-hf":
        code, _, err = run(*arguments[1:])
        assert code == 0, err
        return
    monkeypatch.setattr(sys, "argv", arguments[2:])
    with suppress(SystemExit):
        runpy.run_module(arguments[2], run_name="__main__")


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_options_of_a_command_exist(command, inside, run):
    words = [word for word in shlex.split(command) if word != "..." and not re.match(r"[A-Z_]+=", word)]
    options = [word for word in words if word.startswith("--")]
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).exists()
        words = ["msd-hf", *words[words.index("msd_hf") + 1 :]]
        options = [word for word in words if word.startswith("--")]
    if words[:2] == ["msd-hf", "train"]:
        known = re.findall(r"^  (--[\w-]+)", run("train", "--help-all")[1], re.MULTILINE)
        assert set(options) <= set(known)
    elif words[0] == "msd-hf":
        place, found = 1, typer.main.get_command(cli.app)
        while hasattr(found, "commands"):
            found, place = found.commands[words[place]], place + 1
        found.make_context(words[place - 1], words[place:])  # fails for an unknown option or a missing one
    elif words[0] == "python" and words[1].endswith(".py"):
        assert_named(ROOT / words[1], options)
    elif words[0].endswith(".sh"):
        script = ROOT / words[0]
        assert os.access(script, os.X_OK)
        if script.name == "vllm_cpu.sh":
            assert_named(script.with_name("vllm_check.py"), options)
    elif words[0] == "vllm":
        assert json.loads(words[words.index("--speculative-config") + 1])["method"] in ("eagle", "eagle3")
    elif words[:2] == ["python", "-m"] and words[2].startswith("msd_hf"):
        assert_named(Path(ROOT, *words[2].split(".")).with_suffix(".py"), options)
    elif words[0] == "lmms-eval":
        assert words[words.index("--model") + 1] in {**CHAT_CLASSES, **SIMPLE_CLASSES}
    else:
        assert words[:3] in (["python", "-m", "pip"], ["python", "-m", "pytest"]) or words[1] == "-c"


def assert_named(script, options):
    """Whether a script names each option, or a parameter that becomes it."""
    source = script.read_text(encoding="utf-8")
    for option in options:
        assert option in source or f"{option.removeprefix('--').replace('-', '_')}:" in source, option
