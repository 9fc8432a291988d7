"""Samples at the edges of their format: the last one of the data, fields that are null, a system text given twice."""

from __future__ import annotations

import json

import pytest
import torch

from msd_hf.training.curriculum import Draw
from msd_hf.training.data.conversations import load_conversations
from msd_hf.training.data.encoding import ConversationEncoder
from msd_hf.training.mixture import Mixture


def sample(*texts: str, **fields) -> dict:
    """A LLaVA sample in which user and assistant take turns."""
    roles = ("human", "gpt")
    turns = [{"from": roles[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def texts_of(conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"][-1]["text"]) for message in conversation.messages]


@pytest.mark.parametrize("num_broken", [1, 2])
def test_the_first_sample_replaces_a_broken_last_one(num_broken, toy_processor):
    whole, unanswered = sample("Hello", "Yes."), sample("Hello")
    data = load_conversations([whole, *[sample("Why?", "So.")] * 3, *[unanswered] * num_broken])
    mixture = Mixture({"text": data, "visual": None}, ConversationEncoder(toy_processor))
    got = mixture[Draw(0, "text", 4)]
    assert got["skipped"] == [("text", 4 + number, "no assistant turn") for number in range(num_broken)]
    assert torch.equal(got["input_ids"], mixture[Draw(1, "text", 0)]["input_ids"])


@pytest.mark.parametrize("fields, complete", [({}, True), ({"complete": None}, True), ({"complete": False}, False)])
def test_an_answer_is_complete_unless_the_sample_says_that_it_was_cut(fields, complete):
    """A data set with a column `complete` holds `None` where a sample has no such field."""
    assert load_conversations([sample("Hello", "Yes.", **fields)])[0].complete is complete


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"], ids=ascii)
def test_a_line_of_a_jsonl_file_ends_at_a_line_feed_alone(separator, tmp_path):
    """JSON allows other separators of lines within a text as they are, if they are no control characters."""
    answer = f"Yes{separator}No"
    written = json.dumps(sample("Hello", answer), ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text(f"{written}\r\n\n{written}\n", encoding="utf-8", newline="")
    data = load_conversations(tmp_path / "data.jsonl")
    assert [texts_of(conversation)[-1] for conversation in data] == [("assistant", answer)] * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "red.png"},
        {"images": ["red.png"]},
        {"image": "red.png", "images": None},
        {"image": "red.png", "images": []},
        {"image": None, "images": ["red.png"]},
        {"image": "", "images": ["red.png"]},
    ],
    ids=str,
)
def test_an_empty_column_of_images_hides_no_image(fields, tmp_path):
    data = load_conversations([sample("<image>\nWhat is this?", "Red.", **fields)], image_folder=tmp_path)
    assert data[0].images == (tmp_path / "red.png",)


@pytest.mark.parametrize("system", [None, "", "Be brief.", "Be kind."])
def test_a_system_text_stands_once(system):
    turns = [{"from": "system", "value": "Be brief."}, *sample("Hello", "Yes.")["conversations"]]
    conversation = load_conversations([{"conversations": turns, "system": system}])[0]
    assert texts_of(conversation) == [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes.")]


@pytest.mark.parametrize("system", [None, "", " \n", "Be brief."])
def test_a_system_field_alone_is_the_system_turn(system):
    conversation = load_conversations([sample("Hello", "Yes.", system=system)])[0]
    expected = [("system", "Be brief.")] if system == "Be brief." else []
    assert texts_of(conversation) == [*expected, ("user", "Hello"), ("assistant", "Yes.")]
