"""What `msd-hf bench --data` asks: prompts without answers, in the forms that people have them."""

from __future__ import annotations

import json

import datasets
import pytest
from PIL import Image

from msd_hf.errors import MSDDataError, MSDError
from msd_hf.evaluation.bench_prompts import first_questions
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.training import load_conversations


RED = Image.new("RGB", (40, 40), "red")
ASKED = [{"type": "image"}, {"type": "text", "text": "What is it?"}]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my räum"
    folder.mkdir()
    for name in ("red.png", "COCO_val2014_000000000042.jpg", "COCO_test2015_000000000042.jpg"):
        RED.save(folder / name)
    return folder


def written(folder, name, content):
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text("\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else text)
    return path


def opened(data, **arguments):
    return load_conversations(data, **arguments, needs_answer=False)


@pytest.mark.parametrize(
    "sample",
    [
        {"question_id": 0, "image": "red.png", "text": "What is it?", "category": "conv"},  # LLaVA-Bench, MME
        {"question": "What is it?", "image": "red.png", "answer": "A square."},
        {"prompt": "<image>\nWhat is it?", "image": "red.png"},
        {"prompt": "What is it?", "images": ["red.png"]},
        {"query": "What is it?", "image": "red.png"},
        {"messages": [{"role": "user", "content": "What is it?"}], "images": ["red.png"]},
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}], "image": "red.png"},
        {"question": "What is it?", "image": "red.png", "image_id": 7},
    ],
)
@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_question_about_a_picture(sample, name, folder):
    (conversation,) = opened(written(folder, name, [sample]))
    messages, images = conversation.first_prompt()
    assert messages == [{"role": "user", "content": ASKED}]
    assert [image.size for image in images] == [(40, 40)]


@pytest.mark.parametrize("part, picture", [("val2014", "val2014"), ("test-dev2015", "test2015")])
def test_a_file_of_vqa_names_pictures_by_number(part, picture, folder):
    questions = [{"image_id": 42, "question": "What is it?", "question_id": 42001}]
    content = {"info": {}, "data_type": "mscoco", "data_subtype": part, "questions": questions}
    (conversation,) = opened(written(folder, "v2.json", content))
    assert conversation.id == "42001" and conversation.images == (folder / f"COCO_{picture}_000000000042.jpg",)
    assert conversation.first_prompt()[0][0]["content"] == ASKED
    # A number that stands for no known file must not become a question without its picture.
    del content["data_subtype"]
    with pytest.raises(MSDDataError, match="about the image 42, and does not say which file"):
        opened(written(folder, "v2.json", content))[0]


def test_texts_alone(folder):
    lines = opened(written(folder, "p.txt", "\ufeffFirst?\n\n  Second? \r\n"))
    listed = opened(written(folder, "p.json", ["First?", "Second?"]))
    in_memory = opened(["First?", {"prompt": "Second?", "completion": "Yes."}])
    for data in (lines, listed, in_memory):
        texts = [found.first_prompt()[0][0]["content"] for found in (data[0], data[1])]
        assert texts == [[{"type": "text", "text": "First?"}], [{"type": "text", "text": "Second?"}]]
    # Of several questions of a chat, as in MT-Bench, the first.
    (chat,) = opened(written(folder, "mt.jsonl", [{"question_id": 81, "turns": ["First?", "Second?"]}]))
    assert chat.id == "81" and chat.messages[0]["content"] == [{"type": "text", "text": "First?"}]


def test_data_sets(folder, tmp_path):
    features = {"question": datasets.Value("string"), "image": datasets.Image(), "answer": datasets.Value("string")}
    rows = [{"question": "What is it?", "image": RED, "answer": "red"}, {"question": "Why?", "image": None}]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    (tmp_path / "only a test split").mkdir()
    data.to_parquet(str(tmp_path / "only a test split" / "test-00000-of-00001.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(a=data, b=data).save_to_disk(str(tmp_path / "two"))
    for found in (
        opened(data),
        opened(tmp_path / "only a test split"),
        opened(str(tmp_path / "saved")),
        opened(tmp_path / "two", split="b"),
    ):
        assert found[0].first_prompt()[0][0]["content"] == ASKED and found[0].open_images()[0].size == (40, 40)
        assert found[1].images == ()
    with pytest.raises(MSDError, match="has the splits a, b"):
        opened(tmp_path / "two")
    with pytest.raises(MSDError, match=r"the columns a, and prompts need .*`question`"):
        opened(datasets.Dataset.from_list([{"a": 1}]))
    with pytest.raises(MSDError, match="training needs"):
        load_conversations(data)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("q.json", {"a": [1]}, "must hold a list of objects or texts, or one under `questions`, not a dict"),
        ("q.json", ["text", 3], "element 2 is a int"),
        ("q.json", [{"answer": "x"}], "has no turns under .*`question`, `prompt`, `text`"),
        ("q.json", [{"question": "<image> and <image>", "image": "red.png"}], "number of images is 1"),
        ("q.json", [{"question": " "}], "a turn of the user is empty"),
        ("q.json", [{"turns": [3]}], "has no turns"),
        ("q.json", [{"messages": [{"role": "assistant", "content": "Yes."}]}], "no turn is the user's"),
        ("q.json", [{"question": "a", "image": "gone.png"}], "there is no file"),
        ("q.json", [{"question": "a", "image": "../x.png"}], "is not inside the image folder"),
        ("q.txt", "\n", "no conversations to take prompts from"),
    ],
)
def test_what_cannot_be_asked_is_refused(name, content, message, folder, toy_processor):
    with pytest.raises(MSDError, match=message):
        first_questions(opened(written(folder, name, content)), toy_processor, 5)


def test_training_still_needs_answers(folder):
    with pytest.raises(MSDDataError, match="no turn of the assistant"):
        load_conversations([{"messages": [{"role": "user", "content": "Why?"}]}])[0]
    with pytest.raises(MSDDataError, match="has no turns"):
        load_conversations([{"question": "Why?"}])[0]
    with pytest.raises(MSDError, match="not a dict"):
        load_conversations(written(folder, "v2.json", {"questions": []}))
    with pytest.raises(MSDError, match=r"Name it \.json"):
        load_conversations(written(folder, "p.txt", "Why?"))


def test_prompts_of_one_id_have_names_of_their_own(toy_processor):
    """MME asks two questions about each picture, under one id."""
    samples = [{"question_id": "a.png", "text": text, "image": RED} for text in ("Is it red?", "Is it blue?")]
    first, second = first_questions(opened(samples), toy_processor, 5)
    assert (first.name, second.name) == ("a.png", "a.png (2)") and second.question == "Is it blue?"
    assert second.group == "visual" and second.images[0].size == (40, 40)


def test_the_command_takes_a_split_and_keeps_texts(folder, run, tmp_path):
    data = datasets.Dataset.from_list([{"question_id": 7, "question": "Count from 2 to 4."}])
    datasets.DatasetDict(a=data, b=data).save_to_disk(str(tmp_path / "two"))
    pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR, "--data", tmp_path / "two", "--split", "b")
    few = ("--repeats", 1, "--max-new-tokens", 6, "--baseline", "vanilla")
    code, _, err = run("bench", *pair, *few, "--output", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pair"]["target"] == "target" and report["pair"]["draft"] == "draft"
    (prompt,) = report["prompts"]
    assert prompt["name"] == "7" and prompt["question"] == "Count from 2 to 4."
    assert list(prompt["answers"]) == ["vanilla", "tree"] and len(set(prompt["answers"].values())) == 1
    assert len(prompt["answers"]["tree"]) > 5
    assert f"next: msd-hf bench --compare {tmp_path / 'out'} OTHER_REPORT" in err
    code, _, err = run("bench", *pair[:4], "--data", written(folder, "p.txt", "Why?"), "--split", "b")
    assert code == 1 and "`split` and `subset` are for a saved data set" in err
    code, _, err = run("bench", "--toy", "--split", "b")
    assert code == 1 and "--split and --subset are for a data set of --data" in err


def test_regenerate_answers_prompts_that_have_no_answer(folder, run):
    prompts = written(folder, "p.txt", "Count from 2 to 4.\n")
    given = ("--target", TARGET_DIR, "--data", prompts, "--output", folder / "answers.jsonl", "--max-new-tokens", 6)
    code, _, err = run("regenerate", *given)
    assert code == 0, err
    (conversation,) = load_conversations(folder / "answers.jsonl")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
