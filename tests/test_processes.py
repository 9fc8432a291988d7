"""Several processes share a job. What they write is what one process writes, and none outlives another."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from processes_run import ANSWERS, SHARDS, do_all_jobs
from safetensors.torch import load_file
from training_runs import build_small_target
from transformers import AutoProcessor

from msd_hf.errors import MSDError
from msd_hf.processes.group import ALONE, Processes, launched
from msd_hf.toy import TARGET_DIR, write_dataset
from msd_hf.training.data.conversations import load_conversations
from msd_hf.training.features.cache import FeatureCache, extract_features
from msd_hf.training.regeneration.regenerate import regenerate


SECOND_OF_TWO = Processes(1, 2)  # the other one has done nothing, as if it had been killed at its start
CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "cpu.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("jobs")
    write_dataset(folder, "train", 11, seed=0)
    do_all_jobs(folder, "one")
    return folder


@pytest.fixture(scope="module")
def pair():
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    return build_small_target(processor), processor


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **more}


def test_two_processes_write_what_one_does(folder):
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", free_port()]
    script = Path(__file__).with_name("processes_run.py")
    result = subprocess.run(
        [sys.executable, *launch, script, folder], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(folder / "one-features") == contents(folder / "two-features")
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()
    assert not list(folder.glob("*.partial*"))
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["environment"]["processes"] == 2 and "processes" not in one["environment"]
    for name in ("name", "group", "prompt_tokens", "new_tokens", "acceptance_lengths"):
        assert [prompt[name] for prompt in one["prompts"]] == [prompt[name] for prompt in two["prompts"]]
    assert one["methods"]["tree"]["tau"] == two["methods"]["tree"]["tau"]


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_resume_within_an_epoch(tmp_path):
    write_dataset(tmp_path, "train", 60, seed=0)

    def train(name, *more, processes=2):
        launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", free_port()]
        script = [Path(__file__).with_name("training_processes_run.py"), tmp_path, name, *more]
        command = [sys.executable, *(launch if processes == 2 else ()), *script]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return load_file(tmp_path / name / "model.safetensors")

    whole, resumed = train("whole"), train("resumed", tmp_path / "whole" / "checkpoint-3")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    alone = train("alone", processes=1)
    for name, weight in whole.items():  # sums of another order
        torch.testing.assert_close(weight, alone[name], atol=1e-5, rtol=0)


def test_a_killed_process_ends_the_other_with_one_line(tmp_path):
    script = """
        import sys, time
        from msd_hf.errors import MSDError
        from msd_hf.processes.group import launched
        processes = launched()
        try:
            with processes.together("Start again."):
                print("ready", flush=True)
                time.sleep(60)
        except MSDError as error:
            sys.exit(f"Error: {error}")
    """
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for child in children:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    children[1].kill()
    killed = time.monotonic()
    _, error = children[0].communicate(timeout=60)
    assert children[0].returncode == 1 and time.monotonic() - killed < 20
    line = "Error: Process 0 of 2 ends, because process 1 has ended before its part was done; its own last line may"
    assert f"{line} say why. Start again." in error
    assert children[1].communicate() and children[1].returncode == -signal.SIGKILL


def test_shards_of_a_killed_job_are_kept(folder, pair, tmp_path):
    conversations = load_conversations(folder / "train.json")
    arguments = (*pair, conversations, tmp_path / "cache")
    with pytest.raises(MSDError, match=r"Shard 0 was written, but is not in .* need the same folder"):
        extract_features(*arguments, **SHARDS, processes=SECOND_OF_TWO)
    assert len(list((tmp_path / "cache").glob("shard-*.json"))) == 3  # every second one of 6
    with pytest.raises(MSDError, match="not complete: 3 of 6 shards"):
        FeatureCache(tmp_path / "cache")
    rows = []
    handle = pair[0].get_decoder().register_forward_pre_hook(lambda *_: rows.append(1))
    try:
        extract_features(*arguments, **SHARDS)  # by one process
    finally:
        handle.remove()
    assert len(rows) == 3 and contents(tmp_path / "cache") == contents(folder / "one-features")


def test_other_settings_are_refused_where_only_notes_are(folder, pair, tmp_path):
    arguments = (*pair, load_conversations(folder / "train.json"), tmp_path / "cache")
    with pytest.raises(MSDError, match="Shard 0"):
        extract_features(*arguments, **SHARDS, processes=SECOND_OF_TWO)
    with pytest.raises(MSDError, match="made with `samples_per_shard` 2 instead of 3"):
        extract_features(*arguments, samples_per_shard=3)


def test_answers_of_a_killed_job_are_kept(folder, pair, tmp_path):
    output = tmp_path / "answers.jsonl"
    arguments = (*pair, load_conversations(folder / "train.json"), output)
    with pytest.raises(MSDError, match="Sample 0 was answered, but is not beside"):
        regenerate(*arguments, **ANSWERS, processes=SECOND_OF_TWO)
    part = tmp_path / "answers.jsonl.partial-1"
    lines = part.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines[1:]] == [4, 5, 6, 7]  # the second window of 4
    part.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    (tmp_path / "answers.jsonl.partial").unlink()
    with pytest.raises(MSDError, match="partial-1' was begun with other settings: seed"):
        regenerate(*arguments, **{**ANSWERS, "seed": 4})
    (tmp_path / "answers.jsonl.partial").unlink()
    regenerate(*arguments, **ANSWERS)
    assert output.read_bytes() == (folder / "one.jsonl").read_bytes()
    assert os.listdir(tmp_path) == [output.name]


def test_a_process_without_others_is_alone():
    assert launched() is ALONE
    assert ALONE.gather(5) == [5] and ALONE.from_first(lambda: 6) == 6 and list(ALONE.share(range(3))) == [0, 1, 2]
    assert list(SECOND_OF_TWO.share(range(5))) == [1, 3] and ALONE.device("auto") == "auto"


def test_unequal_files_are_named():
    class Unlike(Processes):
        def gather(self, value):
            return [value, {**value, "target": "b"}]

    with pytest.raises(MSDError, match="Process 1 has another target than process 0"):
        Unlike(0, 2).check_equal({"target": "a", "data": "c"})
