"""Data sets whose answers the target writes itself."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDDataError, MSDError
from msd_hf.prompts import build_chat_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR, make_samples, render
from msd_hf.training.data.conversations import load_conversations
from msd_hf.training.data.encoding import ConversationEncoder
from msd_hf.training.regeneration.answered_chat import AnsweredChat, EntryWriter
from msd_hf.training.regeneration.answers import AnswerGenerator, SeededDraw, pad_left
from msd_hf.training.regeneration.journal import Journal
from msd_hf.training.regeneration.regenerate import regenerate


LIMIT = 32


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TARGET_DIR)


@pytest.fixture(scope="module")
def target():
    # In float64 the answers of a batch and those of single prompts do not differ by rounding.
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR).double()
    # A quarter of its layers still gives sentences that end, in a quarter of the time.
    decoder = target.get_decoder()
    decoder.layers = decoder.layers[::4]
    target.config.text_config.num_hidden_layers = len(decoder.layers)
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    return target


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Text and visual conversations of several turns, in which every answer is "No idea."."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    samples = [sample for kind in ("visual", "text") for sample in make_samples("test", 5, 0, kind)]
    samples = [samples[number] for number in (0, 5, 1, 2, 6, 7, 3, 8, 4, 9)]
    for sample in samples:
        if "scene" in sample:
            render(sample.pop("scene")).save(folder / sample["image"])
        for turn in sample["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = "No idea."
    samples[1]["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    samples[2]["conversations"][0]["value"] += "\n<image>\nAnd this?"
    samples[2]["image"] = [samples[2]["image"], samples[0]["image"]]
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(entry):
    return [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]


def answer_alone(target, processor, messages, images):
    """The next answer to a chat, and whether it ended, by plain `generate`."""
    inputs = build_chat_inputs(processor, messages, images).to(dtype=target.dtype)
    output = target.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output, skip_special_tokens=True).strip(), output[-1] == processor.tokenizer.eos_token_id


def test_every_turn_is_answered_after_the_targets_own_answers(target, processor, data, tmp_path):
    before = load_conversations(json.loads(data.read_text())[:6], data.parent)
    report = regenerate(target, processor, before, tmp_path / "out.jsonl", max_new_tokens=LIMIT, batch_size=3)
    after = load_conversations(report.output, image_folder=data.parent)
    assert [one.id for one in after] == [one.id for one in before]
    assert (report.num_samples, report.skipped) == (6, {})
    num_turns = num_cut = 0
    for old, new in zip(before, after, strict=True):
        images = old.open_images()
        expected, complete = [], True
        for message in old.messages:
            if message["role"] == "assistant":
                num_images = sum(part["type"] == "image" for each in expected for part in each["content"])
                text, complete = answer_alone(target, processor, expected, images[:num_images])
                expected.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
                num_turns += 1
                if not complete:
                    break
            else:
                expected.append(message)
        assert new.messages == expected
        assert new.complete == complete
        assert new.images == old.images
        num_cut += not complete
    assert report.num_cut == num_cut
    assert 0 < num_cut < 6 < num_turns  # some answers are cut, and some conversations have several turns
    assert "No idea." not in report.output.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_written_data_can_be_trained_on(target, processor, data, tmp_path):
    report = regenerate(target, processor, load_conversations(data), tmp_path / "out.jsonl", max_new_tokens=12)
    encoder = ConversationEncoder(processor)
    eos = processor.tokenizer.eos_token_id
    cut = 0
    for conversation in load_conversations(report.output, image_folder=data.parent):
        encoded = encoder(conversation)
        assert encoded["assistant_mask"][-1]
        assert (encoded["input_ids"][-1] == eos) == conversation.complete
        cut += not conversation.complete
    assert cut == report.num_cut > 0


def test_sampled_answers_do_not_depend_on_the_batch(target, processor, data, tmp_path):
    files = {}
    for name, batch_size, seed in (("one", 1, 0), ("four", 4, 0), ("other", 4, 1)):
        output = tmp_path / f"{name}.jsonl"
        state = torch.get_rng_state()
        arguments = {"temperature": 3.0, "top_p": 0.99, "max_new_tokens": 12, "batch_size": batch_size, "seed": seed}
        regenerate(target, processor, load_conversations(data), output, **arguments)
        assert torch.equal(state, torch.get_rng_state())
        files[name] = output.read_text()
    assert files["one"] == files["four"] != files["other"]


def test_sampling_settings_of_the_target_hold(target, processor, data, tmp_path):
    greedy = regenerate(target, processor, load_conversations(data), tmp_path / "greedy.jsonl", max_new_tokens=8)
    chosen = copy.copy(target)
    chosen.generation_config = copy.deepcopy(target.generation_config)
    chosen.generation_config.update(do_sample=True, temperature=0.7, top_k=1)
    for name, temperature in (("hot", 5.0), ("cold", 0.0)):
        report = regenerate(
            chosen,
            processor,
            load_conversations(data),
            tmp_path / f"{name}.jsonl",
            max_new_tokens=8,
            temperature=temperature,
        )
        assert report.output.read_text() == greedy.output.read_text()


def test_rows_draw_from_the_softmax_of_their_scores():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    seeds = [f"seed {number}" for number in range(4000)]
    draw = SeededDraw(seeds, torch.device("cpu"))
    scores = probabilities.log().expand(len(seeds), -1)
    tokens = draw(torch.empty(0), scores).argmax(-1)
    assert torch.allclose(tokens.bincount(minlength=4) / len(seeds), probabilities, atol=0.03)
    assert tokens.bincount(minlength=4)[3] == 0
    second = draw(torch.empty(0), scores).argmax(-1)
    assert 0.3 < (tokens == second).float().mean() < 0.5  # another draw, not the same one
    again = SeededDraw(seeds[7:8], torch.device("cpu"))
    assert again(torch.empty(0), scores[:1]).argmax(-1) == tokens[7]


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_interrupted_run_resumes_to_the_same_result(target, processor, data, tmp_path, monkeypatch, kept):
    arguments = {"max_new_tokens": 10, "batch_size": 2, "temperature": 3.0}
    conversations, answer, batches = load_conversations(data), AnswerGenerator.__call__, []
    limit = None

    def recorded_answer(self, prompts, seeds):
        if len(batches) == limit:
            raise KeyboardInterrupt
        batches.append(list(seeds))
        return answer(self, prompts, seeds)

    monkeypatch.setattr(AnswerGenerator, "__call__", recorded_answer)
    whole = regenerate(target, processor, conversations, tmp_path / "whole.jsonl", **arguments).output.read_bytes()
    expected = list(batches)
    batches.clear()
    limit = len(expected) - 1  # the interrupt comes in the second window, which holds samples 8 and 9
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, processor, conversations, output, **arguments)
    assert not output.exists()
    # A kill while a line is written leaves a part of that line.
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    partial.write_bytes(b"".join(lines[: 1 + kept]) + b'{"sample": {"id"')

    batches.clear()
    limit = None
    report = regenerate(target, processor, conversations, output, **arguments)
    assert output.read_bytes() == whole
    assert report.num_samples == 10
    assert not partial.exists()
    # Rounding differs between batches, so the same batches must be formed; finished ones are not repeated.
    redone = [batch for batch in expected if kept < 8 or batch[0].split("/")[1] in "89"]
    assert batches == redone


def test_a_kill_at_the_last_step_costs_no_answer(target, processor, data, tmp_path, monkeypatch):
    conversations, output = load_conversations(data), tmp_path / "out.jsonl"
    arguments = {"max_new_tokens": 4, "batch_size": 1}
    regenerate(target, processor, conversations, output, **arguments)
    whole = output.read_bytes()
    # A kill between the last two steps leaves both the output and the journal that it was made from.
    records = [json.dumps({"sample": entry}).encode() + b"\n" for entry in read_lines(output)]
    monkeypatch.setattr(Journal, "finish", lambda self, key: self.close())
    output.unlink()
    regenerate(target, processor, conversations, output, **arguments)
    partial = tmp_path / "out.jsonl.partial"
    header = partial.read_bytes().splitlines(keepends=True)[0]
    monkeypatch.undo()
    partial.write_bytes(header + b"".join(records))
    output.write_bytes(whole)
    monkeypatch.setattr(AnswerGenerator, "__call__", lambda *_: pytest.fail("answered again"))
    assert regenerate(target, processor, conversations, output, **arguments).num_samples == 10
    assert output.read_bytes() == whole
    assert not partial.exists()


def test_other_settings_are_refused(target, processor, data, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    arguments = {"max_new_tokens": 4, "top_p": 0.9, "temperature": 1.0}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerGenerator, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, processor, load_conversations(data), output, **arguments)
    with pytest.raises(MSDError, match=r"begun with other settings: seed \(0 -> 1\), top_p \(0.9 -> 0.8\)\. Give"):
        regenerate(target, processor, load_conversations(data), output, **{**arguments, "top_p": 0.8, "seed": 1})
    fewer = load_conversations(json.loads(data.read_text())[:4], data.parent)
    with pytest.raises(MSDError, match=r"other settings: data \("):
        regenerate(target, processor, fewer, output, **arguments)
    with pytest.raises(KeyboardInterrupt):  # the same settings continue the run
        regenerate(target, processor, load_conversations(data), output, **arguments)
    monkeypatch.undo()
    (tmp_path / "there.jsonl").write_text("{}\n")
    with pytest.raises(MSDError, match="exists: remove it"):
        regenerate(target, processor, load_conversations(data), tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"temperature": -1.0}, "`temperature` must be 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"top_k": 5}, "`top_k` needs a `temperature` above 0"),
        ({"do_sample": True}, "`do_sample` cannot be given"),
        ({"temperature": 1.0, "num_beams": 2}, "`num_beams` cannot be given .* with sampling"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(target, processor, data, tmp_path, arguments, message):
    with pytest.raises(MSDError, match=message):
        regenerate(target, processor, load_conversations(data), tmp_path / "out.jsonl", **arguments)
    with pytest.raises(MSDError, match=r"must be a \.jsonl file"):
        regenerate(target, processor, load_conversations(data), tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_broken_samples_are_counted_and_left_out(target, processor, data, tmp_path):
    samples = json.loads(data.read_text())[:6]
    samples[1]["conversations"][1]["value"] = "What is </s> for?"
    samples[2]["image"] = "images/gone.png"
    samples[4]["conversations"][0]["value"] = "word " * 3000
    conversations = load_conversations(samples, data.parent)
    report = regenerate(target, processor, conversations, tmp_path / "out.jsonl", max_new_tokens=4)
    assert [entry["id"] for entry in read_lines(report.output)] == [samples[number]["id"] for number in (0, 3, 5)]
    assert report.num_samples == 3
    assert report.skipped == {"special token in text": 1, "image count": 1, "too long": 1}
    conversations = load_conversations(samples[:2], data.parent)
    with pytest.raises(MSDDataError, match=r"Sample .*written in a turn of the user") as caught:
        regenerate(target, processor, conversations, tmp_path / "strict.jsonl", max_new_tokens=4, strict=True)
    assert caught.value.sample_id == samples[1]["id"]


def test_pictures_in_the_data_are_written_beside_the_output(target, processor, data, tmp_path):
    colours = ["red", "blue", "green"]
    pictures = [Image.new("CMYK" if colour == "red" else "RGB", (30, 20), colour) for colour in colours]
    content = [{"type": "text", "text": "Compare\n"}, {"type": "image"}, {"type": "text", "text": "with"}]
    turns = [
        {"role": "user", "content": [*content, {"type": "image"}]},
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "It does too."},
    ]
    conversations = load_conversations([{"id": 7, "messages": turns, "images": pictures}])
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "own.jsonl"
    regenerate(target, processor, conversations, output, max_new_tokens=100)
    (entry,) = read_lines(output)
    assert entry["image"] == [f"own_images/0000000-{number}.png" for number in range(len(entry["image"]))]
    assert entry["conversations"][0]["value"] == "Compare\n\n<image>\nwith<image>\n"
    (read,) = load_conversations(output)
    assert read.messages[0] == conversations[0].messages[0]
    for old, new in zip(conversations[0].open_images(), read.open_images(), strict=False):
        assert new.tobytes() == old.tobytes()


def test_a_cut_answer_ends_its_conversation(target, processor, data, tmp_path):
    conversations = load_conversations(data)
    report = regenerate(target, processor, conversations, tmp_path / "out.jsonl", max_new_tokens=3)
    entries = read_lines(report.output)
    assert all(len(answers_of(entry)) == 1 and entry["complete"] is False for entry in entries)
    assert report.num_cut == len(entries)
    # Pictures of questions that were not asked are left out.
    late = json.loads(data.read_text())[3]
    late["conversations"][2]["value"] += "\n<image>"
    late["image"] = [late["image"], "images/" + late["image"].split("/")[1]]
    report = regenerate(target, processor, load_conversations([late], data.parent), tmp_path / "late.jsonl",
                        max_new_tokens=3)  # fmt: skip
    assert read_lines(report.output)[0]["image"] == late["image"][0]


def test_target_is_left_as_it_was(target, processor, data, tmp_path):
    settings = copy.deepcopy(target.generation_config)
    target.train()
    try:
        regenerate(target, processor, load_conversations(data), tmp_path / "out.jsonl", max_new_tokens=2)
        assert target.training
    finally:
        target.eval()
    assert target.generation_config.to_dict() == settings.to_dict()


def test_a_draft_does_not_change_the_answers(processor, data, tmp_path):
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR)
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    conversations = load_conversations(json.loads(data.read_text())[:2], data.parent)
    arguments = {"max_new_tokens": 12, "batch_size": 1}
    plain = regenerate(target, processor, conversations, tmp_path / "plain.jsonl", **arguments)
    drafted = regenerate(
        target, processor, conversations, tmp_path / "drafted.jsonl", **arguments, assistant_model=draft
    )
    assert plain.output.read_text() == drafted.output.read_text()


def test_prompts_with_unlike_images_make_one_batch():
    def prompt(length, tiles):
        return {
            "input_ids": torch.arange(1, length + 1)[None],
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "pixel_values": torch.full((1, tiles, 3, 2, 2), 0.5),
            "image_sizes": torch.tensor([[length, tiles]]),
        }

    batch = pad_left([prompt(3, 2), prompt(5, 4)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[9, 9, 1, 2, 3], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert batch["pixel_values"].shape == (2, 4, 3, 2, 2)
    assert batch["pixel_values"].flatten(2).sum(-1).tolist() == [[6.0, 6.0, 0.0, 0.0], [6.0] * 4]
    assert batch["image_sizes"].tolist() == [[3, 2], [5, 4]]


def test_an_image_of_the_user_is_not_written_over(raw_samples, tmp_path):
    conversations = load_conversations(raw_samples["visual"])
    chat = AnsweredChat(conversations[0])
    chat.answer("Yes.", ended=True)
    write = EntryWriter(tmp_path / "own.jsonl", None)
    for _ in range(2):  # a resumed run writes the same image again
        write(0, chat)
    (image,) = (tmp_path / "own_images").iterdir()
    image.write_bytes(b"mine")
    with pytest.raises(MSDError, match="is there, with another image"):
        write(0, chat)
    assert image.read_bytes() == b"mine" and os.listdir(tmp_path / "own_images") == [image.name]
