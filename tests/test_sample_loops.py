"""Each loop over samples counts a broken sample, whatever is wrong with it, and names it; other errors pass."""

import errno
import json
import logging

import fuzz_samples
import pytest
import torch
from torch.utils.data import DataLoader

from msd_hf.errors import MSDDataError, MSDError, describe_error
from msd_hf.training import MSDTrainer, MSDTrainingArguments, extract_features, load_conversations, regenerate
from msd_hf.training.curriculum import Draw
from msd_hf.training.data.check import check_conversations
from msd_hf.training.draft_vocab import count_answer_tokens
from msd_hf.training.mixture import Mixture


LOOPS = ("check", "draft-vocab", "extract", "regenerate", "train")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    fuzz_samples.write_images(folder)
    return fuzz_samples.Jobs(folder)


class Failing(list):
    """Samples, the second of which cannot be read."""

    def __init__(self, error):
        super().__init__(map(fuzz_samples.good, range(4)))
        self.error = error

    def __getitem__(self, index):
        if index == 1:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("loop", LOOPS)
def test_any_error_of_a_sample_is_counted_and_named(loop, jobs, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    data = load_conversations(Failing(TypeError("an odd thing")), jobs.folder)
    with caplog.at_level(logging.WARNING):
        assert jobs.jobs[loop](data) == 3
    named = "Skipped: Sample '1': unexpected error: TypeError: an odd thing"
    if loop == "check":
        report = check_conversations(data, jobs.processor)
        assert report.examples == {"unexpected error": [named.removeprefix("Skipped: ")]}
    else:
        assert caplog.messages.count(named) >= 1


def strictly(loop, jobs, data):
    arguments = {"output_dir": "draft", "curriculum": "text", "max_steps": 1, "use_cpu": True, "report_to": "none"}
    vocab_size = jobs.target.config.text_config.vocab_size
    calls = {
        "check": lambda: check_conversations(data, jobs.processor, strict=True),
        "draft-vocab": lambda: count_answer_tokens([data], jobs.processor, vocab_size, strict=True),
        "extract": lambda: extract_features(jobs.target, jobs.processor, data, "features", strict=True),
        "regenerate": lambda: regenerate(jobs.target, jobs.processor, data, "out.jsonl", strict=True),
        "train": lambda: MSDTrainer(
            target=jobs.target,
            processing_class=jobs.processor,
            args=MSDTrainingArguments(strict=True, per_device_train_batch_size=4, **arguments),
            text_dataset=data,
        ).train(),
    }
    calls[loop]()


@pytest.mark.parametrize("loop", LOOPS)
def test_strict_stops_at_the_first_broken_sample(loop, jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MSDDataError, match=r"^Sample '1': unexpected error: TypeError: an odd thing$"):
        strictly(loop, jobs, load_conversations(Failing(TypeError("an odd thing")), jobs.folder))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        OSError(errno.ENOSPC, "No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt("stop"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_machine_is_not_the_samples(loop, error, jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(type(error), match=r"memory|none left|No space|stop"):
        jobs.jobs[loop](load_conversations(Failing(error), jobs.folder))


def test_a_processor_that_fails_for_a_sample_is_counted_in_every_loop(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_processor = type(jobs.processor.image_processor)
    original = image_processor.__call__

    def fail(self, images, *args, **kwargs):
        if any(image.width < 100 for image in images):
            raise AttributeError("a bug")
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(image_processor, "__call__", fail)
    samples = [*map(fuzz_samples.good, range(3)), {**fuzz_samples.good(3), "image": "dot.png"}]
    for loop in ("check", "extract", "regenerate", "train"):
        assert jobs.jobs[loop](load_conversations(samples, jobs.folder)) == 3


class Numbered(Mixture):
    """A mixture of texts that a plain `DataLoader` can read."""

    def __getitem__(self, index):
        return super().__getitem__(Draw(index, "text", index))


def test_the_error_of_a_worker_is_one_line():
    mixture = Numbered({"text": load_conversations([{}])}, lambda conversation: None)
    with pytest.raises(MSDError, match="Traceback") as error:
        next(iter(DataLoader(mixture, num_workers=1)))
    line = "Not one of the 1 text samples can be used: no conversation. `msd-hf data check` shows what is wrong."
    assert describe_error(error.value) == line


def test_regenerating_no_usable_sample_is_an_error_and_leaves_no_file(jobs, tmp_path):
    with pytest.raises(MSDError, match=r"^None of 2 samples can be used \(no conversation 2\)\.$"):
        regenerate(jobs.target, jobs.processor, load_conversations([{}, {}]), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_unicode_survive_regeneration(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = {**fuzz_samples.good(1), "id": "\ud800 id", "image": "\udcff.png"}
    (jobs.folder / "\udcff.png").write_bytes((jobs.folder / "good.png").read_bytes())
    regenerate(jobs.target, jobs.processor, load_conversations([sample], jobs.folder), "out.jsonl", max_new_tokens=2)
    again = load_conversations("out.jsonl", jobs.folder)
    assert again[0].images == (jobs.folder / "\udcff.png",) and again[0].id == "\\ud800 id"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"id": 1}\n\n{"id": \n', r"a\.jsonl.* is not valid JSON \(line 3, column 8\): Expecting value"),
        ("a.jsonl", b'{"id": 1}\n[]\n', r"a\.jsonl.* line 2 is a list"),
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}', r"a\.jsonl.* is not UTF-8: line 2 holds the byte 0xff"),
        ("a.json", b'[{"id": 1},\n3]', r"a\.json.* element 2 is a int"),
        ("a.json", b'[{"id": 1},\n{"id"}]', r"a\.json.* is not valid JSON \(line 2, column 6\): Expecting"),
    ],
)
def test_errors_of_a_file_name_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MSDError, match=message):
        load_conversations(tmp_path / name)


def test_data_that_is_no_regular_file_is_refused():
    with pytest.raises(MSDError, match="not a regular file"):
        load_conversations("/dev/zero")


def test_an_odd_id_is_shown_and_kept_short(jobs):
    samples = [{"id": "x" * 5000, "conversations": 3}, {"id": "a\x1b[31m", "conversations": 3}]
    data = load_conversations(json.loads(json.dumps(samples)))
    with pytest.raises(MSDDataError) as error:
        data[0]
    assert len(str(error.value)) < 400
    with pytest.raises(MSDDataError, match=r"Sample 'a\\x1b"):
        data[1]
