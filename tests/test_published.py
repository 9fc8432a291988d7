"""What a training run saves and uploads holds no secret and no path of the machine."""

import base64
import contextlib
import copy
import dataclasses
import http.server
import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset
from training_runs import build_small_target, make_trainer

from msd_hf import MSDDraftModel
from msd_hf.evaluation.environment import describe_environment
from msd_hf.toy.training_data import write_training_data
from msd_hf.training import MSDTrainingArguments


TOKEN = "hf_tokenOfSomebody0123456789"
PASSWORD = "correct-horse"
API_KEY = "key-in-the-environment"


class UploadHandler(http.server.BaseHTTPRequestHandler):
    """Takes uploads as the Hub does. Keeps the content of each file by its path in the repository."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]

    def do_GET(self) -> None:
        self.answer({"name": "me", "type": "user", "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"http://{self.headers['Host']}/me/draft"
        self.answer({"url": url, "commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "errors": []})

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def upload_server():
    """Yields the endpoint and the files that were uploaded."""
    handler = type("Handler", (UploadHandler,), {"files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def published(tmp_path_factory, toy_processor):
    """The output folder of `msd-hf train --push-to-hub`, the files that it uploaded, and the folder of the user."""
    user = tmp_path_factory.mktemp("somebodys-machine")
    build_small_target(toy_processor).save_pretrained(user / "target")
    toy_processor.save_pretrained(user / "target")
    write_training_data(user / "data", 12, seed=0)
    config = user / "run.yaml"
    config.write_text(f"hub_token: {TOKEN}\nrun_name: run-of-{TOKEN}\nproject: {API_KEY}\n")
    output = user / "work" / "draft"
    fields = {
        "config": config,
        "target": user / "target",
        "text-data": user / "data" / "text.json",
        "visual-data": user / "data" / "visual.json",
        "image-folder": user / "data",
        "output-dir": output,
        "max-steps": 2,
        "curriculum": "mixed",
        "per-device-train-batch-size": 2,
        "max-length": 512,
        "save-steps": 1,
        "eval-samples": 1,
        "eval-prompts": 1,
        "eval-max-new-tokens": 4,
        "eval-strategy": "steps",
        "eval-steps": 1,
        "load-best-model-at-end": True,
        "metric-for-best-model": "tau",
        "target-written-answers": True,
        "answer-max-new-tokens": 4,
        "lr-scheduler-kwargs": json.dumps({"password": PASSWORD, "path": str(user / "a file")}),
        "report-to": "none",
        "use-cpu": True,
        "push-to-hub": True,
        "hub-model-id": "me/draft",
        "hub-strategy": "all_checkpoints",
        "hub-always-push": True,
        "hub-token": TOKEN,
        "hub-revision": "main",
        "trackio-space-id": f"https://me:{PASSWORD}@host/space?token={TOKEN}",
        "lr-scheduler-type": "constant",
    }
    argv = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    with upload_server() as (endpoint, files):
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(user / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "TRACKER_API_KEY": API_KEY,
            "TQDM_DISABLE": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        result = subprocess.run(
            [sys.executable, "-m", "msd_hf", "train", *argv], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
    return output, dict(files), user


def leaks(content: bytes, user: Path) -> list[str]:
    """The secrets and paths in the content of a file, also in the archives of `torch.save`."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content += b"".join(archive.read(name) for name in archive.namelist())
    texts = [TOKEN, PASSWORD, API_KEY, str(user), str(Path.home()), str(Path(__file__).parent.parent)]
    return [text for text in texts if text.encode() in content]


def test_nothing_in_the_output_folder_is_secret(published):
    output, _, user = published
    files = [path for path in output.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {
        "training_args.bin",
        "training_provenance.json",
        "trainer_state.json",
        "README.md",
        "optimizer.pt",
    } <= names
    assert {path.name: found for path in files if (found := leaks(path.read_bytes(), user))} == {}


def test_nothing_that_is_uploaded_is_secret(published):
    _, files, user = published
    assert {"README.md", "training_args.bin", "training_provenance.json", "model.safetensors"} <= files.keys()
    assert "checkpoint-1/trainer_state.json" in files
    assert {name: found for name, content in files.items() if (found := leaks(content, user))} == {}


def test_the_data_is_not_uploaded(published):
    output, files, _ = published
    assert list(output.glob("_answers/*.jsonl"))
    assert not [name for name in files if "jsonl" in name or "answers" in name]


def test_the_provenance_still_says_what_was_run(published):
    output, files, _ = published
    provenance = json.loads((output / "training_provenance.json").read_text())
    assert json.loads(files["training_provenance.json"]) == provenance
    command = shlex.split(provenance["command"])
    given = dict(zip(command[2::2], command[3::2], strict=True))
    assert given["--hub-token"] == "<redacted>" and given["--max-steps"] == "2" and given["--text-data"] == "text.json"
    assert given["--trackio-space-id"] == "https://<redacted>@host/space?<redacted>"
    assert provenance["target"] == "target"
    assert provenance["arguments"]["run_name"] == "run-of-<redacted>"
    assert provenance["arguments"]["lr_scheduler_kwargs"] == {"password": "<redacted>", "path": "a file"}


def test_training_args_bin_loads_as_a_user_loads_it(published):
    output, _, _ = published
    args = torch.load(output / "training_args.bin", weights_only=False)
    assert isinstance(args, MSDTrainingArguments)
    assert args.max_steps == 2 and args.output_dir == "draft" and args.lr_scheduler_type == "constant"
    assert args.hub_token == "<redacted>" and "max_steps=2" in repr(args)


def test_trackers_get_neither_secrets_nor_paths(tmp_path):
    """TensorBoard writes `to_json_string` below `runs/`, which is uploaded; others send `to_dict` away."""
    args = MSDTrainingArguments(output_dir=str(tmp_path / "run"), hub_token=TOKEN, run_name=f"a {TOKEN}", use_cpu=True)
    for text in (args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert TOKEN not in text and str(tmp_path) not in text and "hub_token" in text
    assert args.to_dict()["learning_rate"] is None and args.to_dict()["lr_scheduler_type"] == "linear"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_a_copy_of_arguments_keeps_everything(copied, tmp_path):
    args = MSDTrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True)
    assert copied(args).hub_token == TOKEN and copied(args).output_dir == str(tmp_path)
    assert pickle.loads(pickle.dumps(args)).hub_token == "<redacted>"


def test_the_path_of_a_local_draft_goes_nowhere(small_target, toy_processor, training_data, tmp_path):
    MSDDraftModel.from_target(small_target).save_pretrained(tmp_path / "start")
    draft = MSDDraftModel.from_pretrained(tmp_path / "start")
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path / "run", model=draft)
    assert str(tmp_path) not in str(trainer.model.config.to_dict())


def test_a_resumed_run_finds_the_best_checkpoint_again(small_target, toy_processor, training_data, tmp_path):
    """The state of a checkpoint names the step of the best one, whose folder may have been moved since."""
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_prompts": 0}
    settings |= {"eval_dataset": Subset(training_data["text"], range(2)), "greater_is_better": True}
    first = make_trainer(small_target, toy_processor, training_data, tmp_path / "run", **settings)
    first.train()
    assert first.state.best_global_step == 1
    (tmp_path / "run").rename(tmp_path / "moved")
    state = json.loads((tmp_path / "moved" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None and state["best_global_step"] == 1
    # In another output folder, because `Trainer` itself looks for the best one only in its own.
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path / "again", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-1")
    best = MSDDraftModel.from_pretrained(tmp_path / "moved" / "checkpoint-1")
    assert torch.equal(best.fc.weight, trainer.model.fc.weight)


def test_the_command_of_a_report_is_free_of_secrets(small_target, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/bin/msd-hf", "bench", "--target", "/home/me/target", "--api-key=abc"])
    command = describe_environment(small_target)["command"]
    assert command == "msd-hf bench --target target '--api-key=<redacted>'"


def test_features_answers_and_reports_hold_no_paths(published, run, tmp_path):
    output, _, user = published
    pair = ("--target", user / "target", "--data", user / "data" / "visual.json")
    few = ("--num-prompts", 1, "--repeats", 1, "--max-new-tokens", 4)
    for command in (
        ("extract", *pair, "--output", tmp_path / "features"),
        ("regenerate", *pair, "--output", tmp_path / "answers.jsonl", "--max-new-tokens", 4),
        ("bench", *pair, "--draft", output, "--output", tmp_path / "report", *few),
    ):
        code, _, err = run(*command)
        assert code == 0, err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"index.json", "answers.jsonl", "report.json", "report.md"} <= {path.name for path in files}
    assert {path.name: found for path in files if (found := leaks(path.read_bytes(), user))} == {}
    assert {path.name for path in files if str(tmp_path).encode() in path.read_bytes()} == set()
