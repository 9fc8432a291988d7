"""The scripts of `examples/` as README shows them, with the bundled pair."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from msd_hf.prompts import build_inputs, read_image
from msd_hf.toy import DEMO_IMAGE, TARGET_DIR


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
    """What the target alone says."""
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR)

    def answer(question: str, image) -> str:
        inputs = build_inputs(toy_processor, question, image)
        ids = target.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
        return toy_processor.decode(ids, skip_special_tokens=True).strip()

    return {PICTURE: answer(PICTURE, read_image(DEMO_IMAGE)), COUNT: answer(COUNT, None)}


@pytest.mark.parametrize("name", ["batch.py", "chat.py", "generate_image.py"])
def test_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


def test_generate_image(run, answers):
    answer, figures = run("generate_image.py").splitlines()
    assert answer.strip() == answers[PICTURE]
    num_tokens, num_forwards = (int(word) for word in figures.split() if word.isdigit())
    assert num_tokens > 2 * num_forwards


def test_batch(run, answers):
    """A prompt with a picture and a shorter one without."""
    printed = run("batch.py", "--questions", PICTURE, COUNT, "--images", str(DEMO_IMAGE), "none")
    blocks = [block.splitlines() for block in printed.strip().split("\n\n")]
    assert [block[:2] for block in blocks] == [[question, answers[question]] for question in (PICTURE, COUNT)]


def test_chat(run, answers):
    """The first answers are the target's alone; later turns read only what is new, and know what came before."""
    asked = [PICTURE, "How many objects are there?"]
    printed = run("chat.py", "--image", str(DEMO_IMAGE), "--say", *asked).splitlines()
    assert printed[0].strip() == answers[PICTURE] and len(printed) == 2
    assert run("chat.py", "--image", str(DEMO_IMAGE), typed="\n".join(asked)).splitlines() == printed
    assert run("chat.py", "--say", COUNT).strip() == answers[COUNT]
