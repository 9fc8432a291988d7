"""The hard world: pictures of many things, albums, questions, and the stages of its target's training."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlavaProcessor

from msd_hf import MSDDraftModel
from msd_hf.loading import load_target_and_processor
from msd_hf.toy import hard, has_facts
from msd_hf.toy.hard import KINDS, HardSamples, Picture, Thing, make_picture, make_prompts, make_sample, render
from msd_hf.toy.hard.bench_prompts import hard_prompts
from msd_hf.toy.hard.dataset import NUM_TURNS, make_album
from msd_hf.toy.hard.picture import CELL, NUM_THINGS, ORDINALS
from msd_hf.toy.hard.processor import build_processor
from msd_hf.toy.hard.target import DEEP_LESSON, build_target_config, stream_batches
from msd_hf.toy.hard.text_questions import SYNONYMS
from msd_hf.toy.hard.vision import cell_labels
from msd_hf.toy.hard.visual_questions import PICTURE_KINDS
from msd_hf.toy.target import build_untrained, collate_samples
from msd_hf.toy.world import BACKGROUNDS, COLOURS, SPLITS, split_of
from msd_hf.training import load_conversations
from msd_hf.training.data.encoding import ConversationEncoder


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor(num_samples=200)


@pytest.mark.parametrize("kind", list(NUM_TURNS))
def test_same_seed_gives_same_samples(kind):
    first = [make_sample("train", index, 3, kind) for index in range(5)]
    assert first == [make_sample("train", index, 3, kind) for index in range(5)]
    assert first[0] != make_sample("train", 0, 4, kind) != make_sample("test", 0, 4, kind)


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_belong_to_their_split(split):
    rng = random.Random(0)
    for grid, (fewest, most) in NUM_THINGS.items():
        for _ in range(20):
            picture = make_picture(rng, split, grid)
            assert split_of(picture.key) == split
            assert fewest <= len(picture.things) <= most
            assert len({(thing.row, thing.column) for thing in picture.things}) == len(picture.things)
            assert render(picture).size == (grid * CELL, grid * CELL)


@pytest.mark.parametrize("kind", list(KINDS))
def test_reference_answers_are_correct_and_those_of_other_questions_are_not(kind):
    prompts = make_prompts("test", 40, 0, kind)
    assert all(has_facts(prompt.answer, prompt.facts) for prompt in prompts)
    others = prompts[1:] + prompts[:1]
    wrong = sum(not has_facts(other.answer, prompt.facts) for prompt, other in zip(prompts, others, strict=True))
    assert wrong >= 30


@pytest.mark.parametrize("kind", [kind for kind, about in KINDS.items() if about == "large"])
def test_answers_about_a_picture_depend_on_the_picture(kind):
    """Without the picture, the answer to the same question is another one most of the time."""
    answers: dict[str, set[str]] = {}
    for seed in range(300):
        rng = random.Random(seed)
        picture = make_picture(rng, "train", 6)
        turn = PICTURE_KINDS[kind](rng, picture)
        answers.setdefault(turn.question, set()).add("|".join(turn.facts))
    asked = [facts for facts in answers.values() if len(facts) > 1]
    assert kind == "find" or asked, "no question was asked of two pictures"


def test_rendering_shows_each_thing_in_its_cell():
    things = (Thing(0, 1, "circle", "red", "large"), Thing(2, 2, text="47"))
    picture = Picture(things, "black", 3)
    image = render(picture)
    middle = CELL // 2
    assert image.getpixel((CELL + middle, middle)) == COLOURS["red"]
    assert image.getpixel((middle, middle)) == BACKGROUNDS["black"]
    assert image.getpixel((2 * CELL + 2, 2 * CELL + middle))[0] > 200  # the card of the sign
    assert render(replace(picture, things=(things[0], replace(things[1], text="48")))) != image


def test_cell_labels_name_what_each_cell_holds():
    picture = Picture(
        (Thing(0, 1, "star", "blue", "small"), Thing(1, 0, text="30"), Thing(1, 1, text="TAXI")), "gray", 2
    )
    labels = cell_labels(picture)
    assert labels[0].tolist() == [0] * 6
    assert (labels[1][:3] > 0).all() and (labels[1][3:] == 0).all()
    assert labels[2].tolist() == [0, 0, 0, 0, 3, 1]  # 3 is the third digit from 1, 0 the first from 0
    assert labels[3][3] > 0 and labels[3].count_nonzero() == 1


def test_albums_have_2_to_16_pictures():
    rng = random.Random(0)
    sizes = {len(make_album(rng, "train", "album")) for _ in range(400)}
    assert sizes == set(range(2, 17))
    assert len(ORDINALS) >= 6


def test_synonyms_replace_each_word_by_another():
    assert not set(SYNONYMS) & set(SYNONYMS.values())
    assert len(set(SYNONYMS.values())) == len(SYNONYMS)


@pytest.mark.parametrize(
    ("kind", "tokens"), [("text", 0), ("small", 144), ("large", 576), ("album", 64), ("gallery", 576)]
)
def test_pictures_become_as_many_tokens_as_they_have_patches(processor, kind, tokens):
    encoder = ConversationEncoder(processor, 4096)
    samples = HardSamples("train", 4, 0, kind)
    for sample, conversation in zip(samples, load_conversations(samples), strict=True):
        encoded = encoder(conversation)
        num_pictures = len(sample.get("image", []))
        assert int((encoded["input_ids"] == processor.image_token_id).sum()) == tokens * num_pictures
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        decoded = processor.tokenizer.decode(encoded["input_ids"][encoded["assistant_mask"]])
        assert decoded == "".join(f" {answer}</s>" for answer in answers)


def test_digits_are_tokens_of_their_own(processor):
    assert processor.tokenizer.tokenize("47")[-2:] == ["4", "7"]


def test_samples_of_several_kinds_take_turns():
    samples = HardSamples("train", 7, 0, "small", "album")
    assert [len(sample["image"]) > 1 for sample in samples] == [False, True] * 3 + [False]
    assert samples[-1] == samples[6] and len(samples[2:4]) == 2
    with pytest.raises(IndexError):
        samples[7]


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match="Unknown split"):
        make_prompts("dev", 1, 0, "row")
    with pytest.raises(ValueError, match="Unknown question kind"):
        make_prompts("test", 1, 0, "poem")
    with pytest.raises(ValueError, match="Unknown kind of sample"):
        make_sample("train", 0, 0, "video")


def test_batches_hold_pictures_of_one_size_and_give_a_loss(processor):
    model = build_untrained(build_target_config(processor, num_layers=1))
    batches = stream_batches(processor, 0, DEEP_LESSON)
    seen = set()
    for _ in range(6):
        samples = next(batches)["samples"]
        shapes = {tuple(sample["pixel_values"].shape[1:]) for sample in samples if "pixel_values" in sample}
        assert len(shapes) <= 1
        seen |= shapes
    with torch.no_grad():
        assert model(**collate_samples(samples[:2], processor.tokenizer.pad_token_id)).loss.isfinite()
    assert seen


@pytest.mark.parametrize("kind", ["story", "row", "difference"])
def test_the_bundled_pair_drafts(kind):
    target, processor = load_target_and_processor(hard.TARGET_DIR)
    draft = MSDDraftModel.from_pretrained(hard.DRAFT_DIR)
    (prompt,) = hard_prompts(processor, 1, seed=3, kinds=[kind])
    inputs = prompt.make_inputs()
    alone = target.generate(**inputs, max_new_tokens=64, do_sample=False)
    out = target.generate(
        **inputs, assistant_model=draft, max_new_tokens=64, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, alone)
    assert out.tau > 2
