"""The toy world: data, rendering, processor, accuracy and the bundled target."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from msd_hf.toy import (
    DEMO_IMAGE,
    TARGET_DIR,
    TEXT_KINDS,
    VISUAL_KINDS,
    Prompt,
    has_facts,
    make_prompts,
    make_samples,
    make_scene,
    render,
    write_dataset,
)
from msd_hf.toy.accuracy import score_answers, total_score
from msd_hf.toy.optimizer import MuonAdamW, orthogonalise
from msd_hf.toy.processor import NUM_IMAGE_TOKENS, build_processor
from msd_hf.toy.target import (
    build_shallow_target,
    build_target_config,
    collate_samples,
    deepen,
    encode_sample,
    save_target,
    stream_encoded,
)
from msd_hf.toy.text_questions import number_name
from msd_hf.toy.training import Budget
from msd_hf.toy.vision import cell_labels
from msd_hf.toy.world import GRID, PLACES, SPLITS, split_of
from msd_hf.training.data.encoding import ConversationEncoder


FIXED_SCENE_KEY = "gray|0:large:pink:circle|1:small:pink:square|2:small:yellow:star|3:small:brown:triangle"


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor(num_samples=500)


def without_scene(sample: dict) -> dict:
    return {key: value for key, value in sample.items() if key != "scene"}


@pytest.mark.parametrize("kind", ["text", "visual"])
def test_same_seed_gives_same_samples(kind):
    first = make_samples("train", 20, 3, kind)
    assert first == make_samples("train", 20, 3, kind)
    assert first != make_samples("train", 20, 4, kind)
    assert first[:7] == make_samples("train", 7, 3, kind)


def test_samples_are_the_same_on_every_machine():
    (sample,) = make_samples("test", 1, 0, "visual")
    assert sample["conversations"][0]["value"].startswith("<image>\n")
    assert split_of("white|3:large:red:circle") == "train"
    assert make_scene(random.Random("fixed"), "test").key == FIXED_SCENE_KEY


def test_splits_share_no_scene():
    keys = {split: {s["scene"].key for s in make_samples(split, 300, 0, "visual")} for split in SPLITS}
    assert all(keys.values())
    for first in SPLITS:
        assert {split_of(key) for key in keys[first]} == {first}
        for second in SPLITS:
            assert first == second or not keys[first] & keys[second]


def test_splits_share_no_text_question():
    questions = {
        split: {s["conversations"][0]["value"] for s in make_samples(split, 600, 0, "text")} for split in SPLITS
    }
    assert min(len(found) for found in questions.values()) > 300
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match="Unknown split"):
        make_samples("dev", 1, 0, "text")
    with pytest.raises(ValueError, match="Unknown kind of sample"):
        make_samples("test", 1, 0, "audio")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown question kind"):
        make_prompts("test", 1, 0, "riddle")


def test_written_dataset_is_llava_json(tmp_path):
    path = write_dataset(tmp_path, "validation", 30, seed=1)
    entries = json.loads(path.read_text())
    assert len(entries) == len({entry["id"] for entry in entries}) == 30
    assert {"image" in entry for entry in entries} == {True, False}
    for entry in entries:
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert len(entry["kinds"]) == len(entry["facts"]) == len(turns) // 2
        tags = [turn["value"].count("<image>") for turn in turns]
        assert tags == [int("image" in entry)] + [0] * (len(turns) - 1)
        if "image" in entry:
            with Image.open(tmp_path / entry["image"]) as image:
                assert image.format == "PNG" and image.size == (144, 144)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["text", "visual"])
def test_answers_have_their_facts(kind):
    seen = set()
    for sample in make_samples("train", 400, 5, kind):
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        for name, facts, answer in zip(sample["kinds"], sample["facts"], answers, strict=True):
            seen.add(name)
            assert has_facts(answer, facts), (answer, facts)
    assert seen == set(VISUAL_KINDS) if kind == "visual" else seen == {*TEXT_KINDS, "follow_up"}


def test_half_of_the_exists_questions_are_answered_no():
    answers = [prompt.answer for prompt in make_prompts("train", 400, 0, "exists")]
    assert 150 < sum(answer.startswith("No") for answer in answers) < 250


def test_visual_answers_need_the_image():
    by_question: dict[str, set[str]] = {}
    for prompt in make_prompts("train", 200, 0, "describe"):
        by_question.setdefault(prompt.question, set()).add(prompt.answer)
    assert all(len(answers) > 5 for answers in by_question.values())


def test_objects_of_a_scene_are_told_apart():
    rng = random.Random(0)
    for _ in range(300):
        objects = make_scene(rng, "train").objects
        assert 1 <= len(objects) <= 4
        assert len({item.name for item in objects}) == len({item.cell for item in objects}) == len(objects)


def test_rendering_shows_the_scene():
    scene = make_scene(random.Random(1), "test", num_objects=1)
    (item,) = scene.objects
    image = render(scene)
    assert image.size == (144, 144) and image.mode == "RGB"
    assert render(scene).tobytes() == image.tobytes()
    for change in (
        {"colour": "pink"},
        {"shape": "cross"},
        {"cell": (item.cell + 1) % len(PLACES)},
        {"offset": (1, -2)},
    ):
        changed = replace(scene, objects=(replace(item, **change),))
        assert changed == scene or render(changed).tobytes() != image.tobytes()
    assert render(replace(scene, background="beige")).tobytes() != render(replace(scene, background="gray")).tobytes()


def test_cell_labels_name_the_cell_of_each_object():
    scene = make_scene(random.Random(2), "train", num_objects=3)
    labels = cell_labels(scene)
    assert labels.shape == (GRID**2, 3)
    assert [cell for cell in range(GRID**2) if labels[cell, 2] < 2] == [item.cell for item in scene.objects]


def test_number_names():
    assert [number_name(n) for n in (0, 7, 13, 20, 42, 99)] == [
        "zero", "seven", "thirteen", "twenty", "forty two", "ninety nine",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="0 to 99"):
        number_name(100)


def test_places_are_never_part_of_each_other():
    for first in PLACES:
        assert [place for place in PLACES if first in place] == [first]


@pytest.mark.parametrize("kind", ["text", "visual"])
def test_tokens_survive_decoding(processor, kind):
    num_tokens = num_characters = 0
    for sample in make_samples("test", 10, 0, kind):
        text = " ".join(turn["value"] for turn in sample["conversations"]).replace("<image>", "")
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.decode(ids) == text
        num_tokens, num_characters = num_tokens + len(ids), num_characters + len(text)
    # Without learnt merges, each character would take a token.
    assert num_tokens < 0.6 * num_characters
    odd = "Zürich, 10 €!"
    assert processor.tokenizer.decode(processor.tokenizer(odd)["input_ids"]) == odd


def test_image_becomes_36_tokens(processor):
    prompt = make_prompts("test", 1, 0, "describe")[0]
    text = processor.apply_chat_template(prompt.messages, add_generation_prompt=True)
    assert text == f"<s>USER: <image>\n{prompt.question} ASSISTANT:"
    inputs = processor(text=text, images=prompt.image, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == NUM_IMAGE_TOKENS == 36
    assert inputs["pixel_values"].shape == (1, 3, 72, 72)


def test_template_takes_plain_strings(processor):
    messages = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yes."}]
    assert processor.apply_chat_template(messages) == "<s>USER: <image>\nHi ASSISTANT: Yes.</s>"


def test_labels_are_the_answers_and_nothing_else(processor):
    encoder = ConversationEncoder(processor)
    for sample in (*make_samples("train", 1, 2, "visual"), *make_samples("train", 12, 4, "text")):
        features = encode_sample(encoder, sample)
        batch = collate_samples([features], 0)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        assert processor.tokenizer.decode(labels[labels >= 0]) == "".join(f" {answer}</s>" for answer in answers)
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
        prompt_text = processor.apply_chat_template(
            [{"role": "user", "content": sample["conversations"][0]["value"]}], add_generation_prompt=True
        )
        images = {"images": render(sample["scene"])} if "scene" in sample else {}
        prompt = processor(text=prompt_text, **images, return_tensors="pt")["input_ids"][0]
        # The tokens before the first answer in training equal the prompt of generation.
        first = int((labels >= 0).nonzero()[0])
        assert torch.equal(ids[:first], prompt)


def test_batches_group_similar_lengths(processor):
    stream = stream_encoded(processor, 0, 2)
    batches = [[next(stream), next(stream)] for _ in range(24)]
    gaps = [abs(len(a["input_ids"]) - len(b["input_ids"])) for a, b in batches]
    assert sum(gaps) / len(gaps) < 15
    batch = collate_samples(batches[0], 0)
    assert batch["input_ids"].shape == batch["labels"].shape


def test_accuracy_of_right_and_wrong_answers():
    prompts = [
        Prompt("Where is the red star?", "It is in the top left.", "place", ("in the top left",)),
        Prompt("How many?", "There are two objects.", "count", ("two objects",)),
        Prompt("How many?", "There is one object.", "count", ("one object",)),
    ]
    answers = ["Look in  the Top left, please.", "There are two objects.", "There are two objects."]
    scores = score_answers(prompts, answers)
    assert (scores["place"].correct, scores["place"].exact, scores["place"].total) == (1, 0, 1)
    assert (scores["count"].correct, scores["count"].exact, scores["count"].total) == (1, 1, 2)
    assert total_score(scores).accuracy == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="3 prompts but 1 answers"):
        score_answers(prompts, ["one"])


def test_facts_are_whole_words():
    assert not has_facts("There is a reddish star.", ["red"])
    assert not has_facts("It is sixty four.", ["sixty", "five"])
    with pytest.raises(ValueError, match="without facts"):
        has_facts("anything", [])


def test_budget_by_steps_and_by_time():
    steps = Budget(max_steps=100)
    assert [steps.progress(step) for step in (0, 50, 200)] == [0.0, 0.5, 1.0]
    assert steps.rate(0) < steps.rate(2) < steps.rate(4) > steps.rate(60) > steps.rate(100) == pytest.approx(0.0)
    assert Budget(max_seconds=1e-9).rate(0) < 1
    with pytest.raises(ValueError, match="either"):
        Budget(max_steps=1, max_seconds=1.0)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 16), (2, 16, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.5


def test_optimizer_fits_a_linear_map():
    torch.manual_seed(0)
    goal, inputs = torch.randn(8, 8), torch.randn(64, 8)
    layer = torch.nn.Linear(8, 8)
    groups = [
        {"params": [layer.weight], "lr": 0.05, "muon": True},
        {"params": [layer.bias], "lr": 0.01, "muon": False},
    ]
    optimizer = MuonAdamW(groups)
    losses = []
    for _ in range(150):
        loss = (layer(inputs) - inputs @ goal.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@torch.no_grad()
def test_deepened_target_computes_the_same(processor):
    shallow = build_shallow_target(processor)
    deep = deepen(shallow, build_target_config(processor))
    assert len(deep.model.language_model.layers) > len(shallow.model.language_model.layers)
    ids = torch.arange(10, 40)[None]
    assert torch.allclose(deep(input_ids=ids).logits, shallow(input_ids=ids).logits, atol=1e-4)


def test_saved_target_loads_as_float32(processor, tmp_path):
    model = deepen(build_shallow_target(processor), build_target_config(processor))
    assert 3.5e6 < model.num_parameters() < 4.5e6
    folder = save_target(model, processor, tmp_path / "target")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 9.3e6
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    again = AutoProcessor.from_pretrained(folder)
    assert again.tokenizer("USER: Hi").input_ids == processor.tokenizer("USER: Hi").input_ids
    assert again.chat_template == processor.chat_template


def test_bundled_target_describes_the_demo_image():
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    model = LlavaForConditionalGeneration.from_pretrained(TARGET_DIR)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with Image.open(DEMO_IMAGE) as image:
        inputs = processor(text=text, images=image, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=120)[0, inputs["input_ids"].size(1) :]
    answer = processor.decode(output, skip_special_tokens=True).strip()
    assert output[-1] == processor.tokenizer.eos_token_id
    assert answer.startswith("The image shows four objects on a") and answer.count("in the") == 4, answer
