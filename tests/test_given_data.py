"""Training data as people have it: raw data sets of `datasets` in several forms, streams, names, several files."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from training_runs import make_trainer
from transformers import AutoModelForImageTextToText

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDDataError, MSDError
from msd_hf.toy import TARGET_DIR
from msd_hf.training import MSDTrainer, MSDTrainingArguments, load_conversations, regenerate
from msd_hf.training.curriculum import Curriculum, CurriculumSampler
from msd_hf.training.data.streamed import StreamedConversations
from msd_hf.training.mixture import Mixture


ANSWER = "The picture is red."
RED = Image.new("RGB", (40, 40), "red")


def text_rows(count=6, first=0):
    return [
        {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": ANSWER}]}
        for n in range(first, first + count)
    ]


def messages(content):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]}


PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
PARTS_OF_ANSWER = [{"type": "text", "text": ANSWER}]
LLAVA = {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": ANSWER}]}
TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": ANSWER}]
FORMS = {
    "messages with parts": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS_OF_ANSWER}]},
        "images",
    ),
    "messages of texts, as in trl": (messages("What is it?"), "images"),
    "LLaVA": (LLAVA, "image"),
    "turns of prompt and completion": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "images"),
    "texts of prompt and completion": ({"prompt": "What is it?", "completion": ANSWER}, "image"),
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("a folder ü") / "red picture.png"
    RED.save(path)
    return path


def stored(form, image, count=4):
    """A data set of one form, whose images are in a column of `datasets`."""
    sample, column = FORMS[form]
    feature = datasets.Image() if column == "image" else datasets.Sequence(datasets.Image())
    rows = [{**sample, column: image if column == "image" else [image]} for _ in range(count)]
    return datasets.Dataset.from_list(rows).cast_column(column, feature)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_forms_of_data_sets(form, streamed, picture):
    data = stored(form, {"bytes": picture.read_bytes(), "path": None})
    conversation = load_conversations(data.to_iterable_dataset() if streamed else data)[0]
    question, answer = conversation.messages
    assert question["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert answer["content"] == [{"type": "text", "text": ANSWER}]
    assert [image.getpixel((3, 3)) for image in conversation.open_images()] == [(255, 0, 0)]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["file", "bytes", "picture", "archive"])
def test_images_as_data_sets_store_them(kind, streamed, picture, tmp_path):
    if kind == "archive":
        import zipfile

        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(picture, "red.png")
    image = {
        "file": str(picture),
        "bytes": {"bytes": picture.read_bytes(), "path": None},
        "picture": RED,
        "archive": f"zip://red.png::{tmp_path / 'a.zip'}",
    }[kind]
    data = stored("LLaVA", image)
    conversation = load_conversations(data.to_iterable_dataset() if streamed else data)[1]
    assert conversation.open_images()[0].getpixel((3, 3)) == (255, 0, 0)


def test_a_lost_image_is_a_broken_sample(picture, tmp_path):
    for path in (tmp_path / "gone.png", f"zip://red.png::{tmp_path / 'gone.zip'}"):
        for data in (stored("LLaVA", str(path)), stored("LLaVA", str(path)).to_iterable_dataset()):
            with pytest.raises(MSDDataError, match=r"gone\.") as error:
                load_conversations(data)[0].open_images()
            assert error.value.reason == "missing image"
    # A path in a text file is still bound to the folder of its images.
    with pytest.raises(MSDDataError, match="image folder"):
        load_conversations([{**LLAVA, "image": {"bytes": None, "path": str(picture)}}])[0]


def trained(target, processor, output_dir, **given):
    arguments = {"max_steps": 2, "curriculum": "mixed", "per_device_train_batch_size": 2, **given.pop("arguments", {})}
    given = {"text": None, "visual": None, **given}
    trainer = make_trainer(target, processor, given, output_dir, eval_dataset=given.get("held_out"), **arguments)
    trainer.train()
    return trainer


def test_raw_data_sets_train_like_opened_ones(small_target, toy_processor, picture, tmp_path):
    """And `train` leaves the draft in the output folder."""
    data = {"text": datasets.Dataset.from_list(text_rows()), "visual": stored("LLaVA", str(picture))}
    opened = {kind: load_conversations(part) for kind, part in data.items()}
    runs = [
        trained(
            small_target, toy_processor, tmp_path / name, **given, held_out=datasets.Dataset.from_list(text_rows(2))
        )
        for name, given in (("raw", data), ("opened", opened))
    ]
    for name, weight in runs[0].model.state_dict().items():
        assert torch.equal(weight, runs[1].model.state_dict()[name]), name
    assert runs[0].evaluate()["eval_loss"] > 0
    draft = MSDDraftModel.from_pretrained(tmp_path / "raw")
    assert torch.equal(draft.fc.weight, runs[0].model.fc.weight)
    provenance = json.loads((tmp_path / "raw" / "training_provenance.json").read_text())
    assert provenance["finished"] and provenance["data"]["text"] == 6


def test_a_stream_is_trained_on_and_resumed(small_target, toy_processor, picture, tmp_path):
    """Broken samples in it are skipped and counted, and a killed run ends like an uninterrupted one."""
    rows = text_rows()
    rows[1:1] = [{"messages": [{"role": "user", "content": "Nobody answers."}]}] * 3
    data = {
        "text": datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4),
        "visual": stored("LLaVA", str(picture)).to_iterable_dataset(),
    }
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(small_target, toy_processor, tmp_path / "whole", **data, arguments=steps)
    facts = whole.provenance()["data"]
    assert facts == {
        "text": None,
        "visual": None,
        "cached_features": False,
        "skipped": {"no assistant turn": facts["skipped"]["no assistant turn"]},
        "visual_positions": {"36": sum(facts["visual_positions"].values())},
    }
    resumed = make_trainer(
        small_target,
        toy_processor,
        data,
        tmp_path / "whole",
        curriculum="mixed",
        per_device_train_batch_size=2,
        **steps,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    other = {**data, "text": datasets.Dataset.from_list(text_rows(first=50)).to_iterable_dataset()}
    changed = make_trainer(
        small_target,
        toy_processor,
        other,
        tmp_path / "whole",
        curriculum="mixed",
        per_device_train_batch_size=2,
        **steps,
    )
    with pytest.raises(MSDError, match="other text data"):
        changed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def numbers(stream, places):
    return [stream[place].messages[0]["content"][0]["text"] for place in places]


def test_a_stream_is_read_in_order_and_again_after_its_end():
    stream = load_conversations(datasets.Dataset.from_list(text_rows(3)).to_iterable_dataset())
    assert isinstance(stream, StreamedConversations)
    counted = [f"Count to {n}." for n in range(3)]
    assert numbers(stream, range(7)) == [*counted, *counted, counted[0]]
    stream.begin_at(8)
    assert numbers(stream, [8, 10, 9]) == [counted[2], counted[1], counted[0]]
    assert numbers(stream, [1]) == [counted[1]]  # a step back begins anew
    fingerprint = stream.fingerprint
    assert fingerprint == load_conversations(Endless(3)).fingerprint
    assert fingerprint != load_conversations(Endless(4)).fingerprint


class Endless:
    """A stream of another kind, which breaks off."""

    def __init__(self, count, fails=False):
        self.count, self.fails = count, fails

    def __iter__(self):
        yield from text_rows(self.count)
        if self.fails:
            raise ConnectionError("the line is dead")


def test_streams_that_cannot_be_used():
    broken = load_conversations(Endless(2, fails=True))
    with pytest.raises(MSDError, match=r"broke off after 2 samples.*the line is dead.*resume_from_checkpoint"):
        broken[2]
    with pytest.raises(MSDError, match="holds no samples"):
        load_conversations(Endless(0))[0]
    with pytest.raises(MSDError, match="twice"):
        load_conversations(row for row in text_rows())
    with pytest.raises(MSDError, match="streamed and has no length"):
        load_conversations([Endless(2), datasets.Dataset.from_list(text_rows()).to_iterable_dataset()][1:] * 2)
    mixture = Mixture({"text": load_conversations(Unanswered())}, lambda conversation: conversation)
    with pytest.raises(MSDError, match="Not one of the 1000 text samples can be used: no assistant turn"):
        mixture[CurriculumSampler(None, None, Curriculum("text"), 4, 4).draw(0)]


def test_a_stream_keeps_no_sample_that_was_trained_on():
    class Row(dict):
        """A `dict` that can be referred to weakly."""

    class Stream:
        def __iter__(self):
            for row in map(Row, text_rows(20)):
                refs.append(weakref.ref(row))
                yield row

    refs = []
    mixture = Mixture({"text": load_conversations(Stream())}, lambda conversation: {"id": conversation.id})
    for draw in CurriculumSampler(None, None, Curriculum("text"), 20, 20):
        mixture[draw]
    assert sum(ref() is not None for ref in refs) <= 2 < len(refs)


class Unanswered:
    def __iter__(self):
        yield {"messages": text_rows(1)[0]["messages"][:1]}


def test_samples_of_a_stream_are_drawn_one_after_the_other():
    sampler = CurriculumSampler(None, 5, Curriculum("mixed"), 40, 40, seed=1)
    draws = list(sampler)
    places = [draw.place for draw in draws if draw.kind == "text"]
    assert places == list(range(len(places))) and 5 < len(places) < 35
    assert [sampler.draw(number) for number in (30, 7, 39)] == [draws[30], draws[7], draws[39]]
    assert {draw.place for draw in draws if draw.kind == "visual"} == set(range(5))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"train_dataset": text_rows(), "text_dataset": text_rows()}, "not all"),
        ({"train_dataset": text_rows()}, "of one kind, text.*or set `curriculum` to 'text'"),
        ({"train_dataset": []}, "`train_dataset` holds no samples"),
        ({"train_dataset": Endless(3), "max_steps": 2}, "A stream as `train_dataset` is not told apart"),
        ({"text_dataset": Endless(3)}, "set `max_steps`"),
        ({"text_dataset": Endless(3), "max_steps": 2, "dataloader_num_workers": 2}, "`dataloader_num_workers` to 0"),
        ({"text_dataset": datasets.DatasetDict(a=datasets.Dataset.from_list(text_rows()))}, "choose one split"),
        (
            {"text_dataset": datasets.Dataset.from_dict({"text": ["a"]})},
            r"columns text, and training needs `messages`",
        ),
        ({"text_dataset": text_rows(), "eval_dataset": Endless(2)}, "streamed and has no length"),
        ({"text_dataset": 3}, "cannot be read"),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence(given, message, small_target, toy_processor, tmp_path):
    names = ("max_steps", "dataloader_num_workers")
    arguments = {name: given[name] for name in names if name in given}
    data = {name: value for name, value in given.items() if name not in names}
    args = MSDTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **arguments)
    with pytest.raises(MSDError, match=message):
        MSDTrainer(target=small_target, processing_class=toy_processor, args=args, **data)
    assert not (tmp_path / "out").exists()


def test_one_data_set_with_both_kinds(small_target, toy_processor, picture, tmp_path):
    """`train_dataset` is told apart by images; so is a dictionary of the two kinds."""
    rows = [*text_rows(), *([{**LLAVA, "image": str(picture)}] * 4)]
    mixed = load_conversations(rows, picture.parent)
    args = MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for given in (mixed, {"text": text_rows(), "visual": stored("LLaVA", str(picture))}):
        trainer = MSDTrainer(target=small_target, processing_class=toy_processor, args=args, train_dataset=given)
        assert trainer.train_dataset.sizes == {"text": 6, "visual": 4}
    args.curriculum = "text"
    trainer = MSDTrainer(target=small_target, processing_class=toy_processor, args=args, train_dataset=text_rows())
    assert trainer.train_dataset.sizes == {"text": 6}


def test_the_processor_may_be_left_out(small_target, toy_processor, tmp_path):
    args = MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", curriculum="text")
    with pytest.raises(MSDError, match="give its processor as `processing_class`"):
        MSDTrainer(target=small_target, args=args, text_dataset=text_rows())
    small_target.config._name_or_path = str(TARGET_DIR)
    trainer = MSDTrainer(target=small_target, args=args, text_dataset=text_rows())
    assert trainer.encoder.fingerprint == type(trainer.encoder)(toy_processor, args.max_length).fingerprint
    with pytest.raises(MSDError, match="needs the draft's `target`"):
        MSDTrainer(args=args, text_dataset=text_rows())


@pytest.fixture
def files(tmp_path):
    names = [tmp_path / "many.json", tmp_path / "few ü.json"]
    for name, rows in zip(names, (text_rows(6), text_rows(2, first=100)), strict=True):
        name.write_text(json.dumps(rows))
    return names


def test_several_data_sets_and_their_shares(files):
    joined = load_conversations(files)
    assert numbers(joined, range(len(joined))) == [f"Count to {n}." for n in (0, 1, 2, 3, 4, 5, 100, 101)]
    assert numbers(joined, [-1]) == ["Count to 101."]
    weighted = load_conversations(files, weights=[1, 2])
    seen = numbers(weighted, range(len(weighted)))
    assert len(seen) == 18 and seen[:6] == [f"Count to {n}." for n in range(6)]
    assert seen[6:] == ["Count to 100.", "Count to 101."] * 6
    assert len({joined.fingerprint, weighted.fingerprint, load_conversations(files[0]).fingerprint}) == 3
    assert len(load_conversations(files[:1], weights=[3])) == 6
    for weights, message in (
        ([1], "2 data sets, but 1 weights"),
        ([1, 0], "above 0"),
        ([1, float("nan")], "above 0"),
        (5, "a list with a number for each"),
        (["1", "2"], "a list with a number for each"),
        ([1, 1e-300], "closer"),
    ):
        with pytest.raises(MSDError, match=message):
            load_conversations(files, weights=weights)
    with pytest.raises(MSDError, match="for a list of several"):
        load_conversations(files[0], weights=[1])


def test_training_on_several_files_by_command(run, files, tmp_path, monkeypatch):
    fast = ["--max-steps", 1, "--per-device-train-batch-size", 2, "--curriculum", "text", "--save-strategy", "no"]
    fast += ["--use-cpu", "True", "--report-to", "none", "--disable-tqdm", "True", "--max-length", 128]
    start = ["train", "--target", TARGET_DIR, "--output-dir", tmp_path / "draft", "--text-data", *files, *fast]
    for more, message in (
        (["--text-data-weights", 1], "of which there are 2; got [1.0]"),
        (["--text-data-weights", 1, 3, "--eval-samples", 1], "give --eval-data"),
    ):
        code, _, err = run(*start, *more)
        assert code == 1 and message in " ".join(err.split())
    code, _, err = run(*start, "--text-data-weights", 1, 2)
    assert code == 0, err
    provenance = json.loads((tmp_path / "draft" / "training_provenance.json").read_text())
    assert provenance["data"]["text"] == 18 and MSDDraftModel.from_pretrained(tmp_path / "draft").config.hidden_size


def test_saved_data_sets_by_name(run, picture, tmp_path):
    data = stored("LLaVA", str(picture))
    data.save_to_disk(tmp_path / "one")  # with the bytes of its images
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in text_rows()))
    sizes = [
        len(load_conversations(tmp_path / "one")),
        len(load_conversations(str(tmp_path / "two"))),
        len(load_conversations(tmp_path / "two", split="test")),
        len(load_conversations(tmp_path / "files")),
    ]
    assert sizes == [4, 4, 1, 6]
    with pytest.raises(MSDError, match="has the splits train, test"):
        load_conversations(tmp_path / "two", split="validation")
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", "nobody/no-such-data", "no-such-data"):
        with pytest.raises(MSDError, match="cannot be loaded") as error:
            load_conversations(name)
        assert Path(str(name)).name in str(error.value)
    code, out, err = run("data", "check", "--data", tmp_path / "two", "--split", "test", "--target", TARGET_DIR)
    assert code == 0 and ANSWER in out, err


def test_a_data_set_by_name_reads_no_other_files(picture, tmp_path):
    """Who made it could name any file of this machine as an image."""
    inside = tmp_path / "data" / "red.png"
    inside.parent.mkdir()
    RED.save(inside)
    for name, path in (("inside", inside), ("outside", picture)):
        stored("LLaVA", {"bytes": None, "path": str(path)}).to_parquet(tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.parquet").rename(tmp_path / "data" / "train.parquet")
        conversations = load_conversations(tmp_path / "data")
        if name == "inside":
            assert conversations[0].open_images()[0].size == RED.size
            continue
        with pytest.raises(MSDDataError, match="is no file of this data set") as error:
            conversations[0]
        assert error.value.reason == "image outside folder"


def test_pictures_of_a_data_set_are_regenerated_with(toy_processor, picture, tmp_path):
    """Their files lie anywhere, so the answers are given copies."""
    report = regenerate(
        AutoModelForImageTextToText.from_pretrained(TARGET_DIR),
        toy_processor,
        load_conversations(stored("LLaVA", str(picture), count=1)),
        tmp_path / "answers.jsonl",
        max_new_tokens=8,
    )
    assert load_conversations(report.output)[0].open_images()[0].getpixel((3, 3)) == (255, 0, 0)
