"""
The families of `examples/FAMILIES.md`: each one that is served gives the target's own tokens, each one that is refused
is refused with the sentence of the page, and the page lists what the installed transformers has.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from recurrent_families import RECURRENT_FAMILIES
from survey_configs import PAD
from survey_inputs import image_inputs, text_inputs
from survey_page import note_of, read_page, write_page
from survey_pairs import IMAGE_CLASSES, SAMPLING, TEXT_CLASSES, build_draft, build_target, compare
from survey_rows import FAILED, REFUSED, SERVED, UNTRIED, Row, find_inputs, find_row, train_draft
from survey_table import FIELDS, NO_TARGETS
from test_unusual_targets import CHAINS, TREES
from transformers import set_seed

from msd_hf import MSDError
from msd_hf.target.adapter import TargetAdapter


EXAMPLES = Path(__file__).parents[1] / "examples"
VERSION, ROWS = read_page(EXAMPLES / "FAMILIES.md")
ROW_OF = {row["family"]: row for row in ROWS}
BY_STATUS = {status: [row["family"] for row in ROWS if row["status"] == status] for status in (SERVED, REFUSED)}
# Files of their own make many calls of these.
TRIED_ELSEWHERE = {*TREES, *CHAINS}
if transformers.__version__ == VERSION:
    TRIED_ELSEWHERE |= {family.config().model_type for family in {**FAMILIES, **RECURRENT_FAMILIES}.values()}
# Models, inputs and refusals of another release may differ; `families.py` says how.
of_this_release = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"the page was written with transformers {VERSION}"
)


@of_this_release
def test_the_page_lists_every_family():
    assert set(ROW_OF) == {*IMAGE_CLASSES, *TEXT_CLASSES}
    assert len(ROWS) == len(ROW_OF)


def test_no_family_fails():
    assert [row["family"] for row in ROWS if row["status"] == FAILED] == []


@of_this_release
def test_almost_every_family_with_images_is_tried_with_one():
    """Or it is one that has no images or no text alone, and the page says so."""
    tried = [name for name in IMAGE_CLASSES if ROW_OF[name]["image"].startswith(("same", "near-tie", "alone"))]
    assert len(tried) >= 85
    for name in IMAGE_CLASSES:
        assert name in tried or ROW_OF[name]["note"], name


@of_this_release
def test_every_entry_of_the_tables_is_a_family():
    assert {*FIELDS, *NO_TARGETS} <= {*IMAGE_CLASSES, *TEXT_CLASSES}


@of_this_release
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=pytest.mark.slow if name in TRIED_ELSEWHERE else ()) for name in BY_STATUS[SERVED]],
)
def test_served(model_type):
    """Greedy with an image if the family reads images, else with text."""
    row = Row(model_type)
    target = build_target(model_type)
    inputs = find_inputs(row, target).inputs
    found = compare(target, build_draft(target), inputs.get("image", inputs.get("text")))
    assert found.outcome in ("same", "near-tie")
    assert ("image" in inputs) == (ROW_OF[model_type]["image"].startswith(("same", "near-tie")))


@of_this_release
@pytest.mark.slow
@pytest.mark.parametrize("model_type", BY_STATUS[SERVED])
def test_whole_rows(model_type):
    """As on the page: text and image, greedy and sampled, and a falling loss of a draft in training."""
    row = find_row(model_type, training=True)
    assert row.status == SERVED
    assert row.loss[1] < row.loss[0]


@of_this_release
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model_type", BY_STATUS[SERVED])
def test_padded_batches(model_type, options):
    """Rows of text with padding on the left, as far as the target alone reads such rows."""
    target = build_target(model_type)
    inputs = text_inputs(target, 1)
    ids = torch.cat([text_inputs(target, seed)["input_ids"] for seed in (1, 2, 3)])
    for row, padding in ((1, 5), (2, 2)):
        ids[row, :padding] = PAD
    inputs = {name: torch.zeros_like(ids) for name in inputs}
    inputs.update(input_ids=ids, attention_mask=(ids != PAD).long())
    options = {"max_new_tokens": 12, **options}
    try:
        set_seed(0)
        alone = target.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    except Exception as error:
        pytest.skip(f"the target alone fails: {error}")
    if not all(bool(logits[:, PAD + 1].isfinite().all()) for logits in alone.logits):
        pytest.skip("eager attention in float64 gives no numbers for padded rows")
    try:
        set_seed(0)
        tokens = target.generate(**inputs, **options, assistant_model=build_draft(target))
    except MSDError as error:
        pytest.skip(f"refused: {error}")
    assert tokens.equal(alone.sequences)


@of_this_release
@pytest.mark.parametrize("model_type", BY_STATUS[REFUSED])
def test_refused(model_type):
    row = find_row(model_type)
    assert row.status == REFUSED
    assert _without_numbers(note_of(row)) == _without_numbers(ROW_OF[model_type]["note"])


def _without_numbers(sentence: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "…", sentence)


# With M-RoPE, with tiles, with experts, with rows of an image of its own, with a cap on logits.
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava_next", "ernie4_5_vl_moe", "git", "gemma2"])
def test_drafts_learn_from_features(model_type):
    target = build_target(model_type)
    inputs = image_inputs(target, 1) if model_type in IMAGE_CLASSES else text_inputs(target, 1)
    before, after = train_draft(target, build_draft(target), inputs)
    assert after < 0.7 * before


@of_this_release  # the GIT of transformers 5.10 takes no mask of a tree behind an image, and is refused
def test_rows_that_a_decoder_adds_in_a_padded_batch():
    """GIT puts 17 rows of the image before the tokens, which no mask of the prompt knows of."""
    target = build_target("git")
    first, second = (image_inputs(target, seed) for seed in (1, 2))
    ids = second["input_ids"].clone()
    ids[:, :3] = PAD
    inputs = {name: torch.cat([first[name], second[name]]) for name in first}
    inputs["input_ids"] = torch.cat([first["input_ids"], ids])
    inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    draft = build_draft(target)
    set_seed(0)
    expected = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=draft).equal(expected)


@pytest.fixture(scope="module")
def llama():
    target = build_target("llama")
    return target, build_draft(target), text_inputs(target, 1)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda logits: logits.roll(1, -1), "different"),
        (lambda logits: logits * 1.001, "other logits"),
        (lambda logits: logits * (1 + 1e-7), "same"),
    ],
)
def test_a_wrong_verification_is_found(llama, monkeypatch, change, outcome):
    original = TargetAdapter.verify

    def verify(*args, **kwargs):
        verification = original(*args, **kwargs)
        verification.logits = change(verification.logits)
        return verification

    monkeypatch.setattr(TargetAdapter, "verify", verify)
    assert compare(*llama, **SAMPLING).outcome == outcome
    assert compare(*llama).outcome == ("different" if outcome == "different" else "same")


def test_candidates_are_accepted(llama):
    lengths = compare(*llama).lengths
    assert sum(lengths) > 2 * len(lengths)
    assert sum(row["tau"] > "1.3" for row in ROWS) > 0.8 * len(BY_STATUS[SERVED])


def test_pictures_count():
    assert [row["family"] for row in ROWS if "without effect" in row["image"]] == []


def test_a_new_family_is_untried(monkeypatch):
    monkeypatch.setitem(TEXT_CLASSES, "unheard_of", "UnheardOfForCausalLM")
    row = find_row("unheard_of")
    assert row.status == UNTRIED and "unheard_of" in row.note


@pytest.mark.parametrize(
    ("end", "note"),
    [
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "its process ended with status 9"),
        (lambda *_: time.sleep(30), "took longer than 1 s"),
    ],
)
def test_a_family_ends_no_other(monkeypatch, end, note):
    script = runpy.run_path(str(EXAMPLES / "studies" / "families.py"))
    find = script["find_in_process"]
    monkeypatch.setitem(find.__globals__, "_find", end)
    row = find("llama", False, 1)
    assert (row.status, row.note) == (FAILED, note)


def test_a_page_is_read_as_it_was_written(tmp_path):
    rows = [
        Row("a", "A", SERVED, "same", "no input: x | y", tau=1.5, dtype="float32", deviation=2e-6, loss=(2.0, 1.0)),
        Row("b", "B", REFUSED, "alone", note="No | never. Call `generate` without `assistant_model`."),
    ]
    write_page(tmp_path / "page.md", rows, 1)
    version, found = read_page(tmp_path / "page.md")
    assert version == transformers.__version__
    assert [(row["family"], row["class"], row["status"], row["text"], row["image"]) for row in found] == [
        ("a", "A", SERVED, "same", "no input"),
        ("b", "B", REFUSED, "alone", "–"),
    ]
    assert [row["note"] for row in found] == ["no input: x | y", "No | never."]
    assert (found[0]["tau"], found[0]["logits"], found[0]["loss"]) == ("1.50", "2e-06, float32", "2.00 → 1.00")
    assert "| Image and text | 1 | 0 | 0 | 0 | 0 | 1 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
