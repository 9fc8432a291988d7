"""`msd-hf train` runs as a user runs it: in one process, killed and resumed, and in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import build_small_target

from msd_hf import MSDDraftModel, cli
from msd_hf.toy.training_data import write_training_data
from msd_hf.training.script import parse_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_processor):
    """A target in its own folder, and conversations in files."""
    path = tmp_path_factory.mktemp("user")
    build_small_target(toy_processor).save_pretrained(path / "target")
    toy_processor.save_pretrained(path / "target")
    write_training_data(path / "data", 40, seed=0)
    return path


def arguments(folder, output, **more):
    fields = {
        "target": folder / "target",
        "text-data": folder / "data" / "text.json",
        "visual-data": folder / "data" / "visual.json",
        "image-folder": folder / "data",
        "output-dir": output,
        "max-steps": 12,
        "per-device-train-batch-size": 4,
        "learning-rate": 1e-3,
        "warmup-steps": 0,
        "logging-steps": 1,
        "max-length": 512,
        "report-to": "none",
        "use-cpu": True,
        "seed": 0,
        **more,
    }
    return [str(part) for name, value in fields.items() if value is not None for part in (f"--{name}", value)]


def environment(**more):
    root = Path(__file__).parent.parent
    return {**os.environ, "PYTHONPATH": str(root), "TQDM_DISABLE": "1", **more}


def run_main(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["msd-hf", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
        sys.exit(0)
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out, captured.err


def test_one_command_gives_a_draft_that_loads(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "draft"
    more = {"eval-samples": 2, "eval-max-new-tokens": 8, "num-assistant-tokens": 12, "tree-depth": 3, "tree-top-k": 2}
    code, out, err = run_main(monkeypatch, capsys, "train", *arguments(folder, output, **more))
    assert code == 0, err
    assert "tau_text" in out and "tau_visual" in out and f"The draft is in {output}" in out
    draft = MSDDraftModel.from_pretrained(output)
    assert draft.generation_config.num_assistant_tokens == 12 and draft.generation_config.tree_top_k == 2
    assert draft.config.target_text_model_type == "llama" and draft.config.use_cache
    provenance = json.loads((output / "training_provenance.json").read_text())
    assert provenance["step"] == 12 and provenance["metrics"]["eval_tau"] >= 1
    assert "--text-data" in provenance["command"]
    assert not any("preprocessor" in path.name or "tokenizer" in path.name for path in output.iterdir())


def test_a_run_that_gets_no_better_is_stopped(folder, tmp_path, monkeypatch, capsys):
    more = {"eval-samples": 1, "eval-prompts": 1, "eval-max-new-tokens": 4, "learning-rate": 0.0, "max-steps": 6}
    more |= {"eval-strategy": "steps", "eval-steps": 1, "save-steps": 1, "metric-for-best-model": "tau"}
    more |= {"load-best-model-at-end": True, "early-stopping-patience": 2}
    code, _, err = run_main(monkeypatch, capsys, "train", *arguments(folder, tmp_path, **more))
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_the_command_line_overrides_a_yaml_file_of_arguments(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"target: {folder / 'target'}\ntext_data: a.json\nvisual-data: b.json\nlearning_rate: 3e-4\nmax_steps: 7\n"
        "bf16: false\nrecipe: recommended\ntarget_layers: [5, 1]\n"
    )
    script_args, args = parse_arguments(["--config", str(config), "--max-steps", "9", "--output_dir", str(tmp_path)])
    assert script_args.text_data == "a.json" and script_args.visual_data == "b.json"
    assert (args.learning_rate, args.max_steps, args.recipe, args.bf16) == (3e-4, 9, "recommended", False)
    assert args.layers_of(20) == [1, 5]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--text-data", "a.json"], "--target is missing"),
        (["--target", "t"], "There is nothing to train on"),
        (["--target", "t", "--text-data", "a.json"], "needs visual samples: give --visual-data, or --curriculum text"),
        (["--target", "t", "--textdata", "a.json"], "Unknown arguments --textdata a.json"),
        (["--max-steps", "many"], "invalid int value: 'many'"),
        (["--target", "t", "--text-data", "a.json", "--eval-samples", "-1"], "--eval-samples must not be negative"),
        (
            ["--target", "t", "--text-data", "a.json", "--num-assistant-tokens", "0"],
            "must be an integer of at least 1",
        ),
        (["--target", "t", "--text-data", "a.json", "--report-to", "nothing"], "--report-to nothing"),
        (["--target", "t", "--text-data", "a.json", "--early-stopping-patience", "2"], "--load-best-model-at-end"),
        (["--recipe", "quick"], "invalid choice: 'quick'"),
        (["--config", "nothing.yaml"], "'nothing.yaml' cannot be read"),
        (["--target", "t", "--text-data", "nothing.json", "--curriculum", "text"], "nothing"),
        (
            ["--target", "t", "--text-features", "f", "--curriculum", "text", "--target-written-answers"],
            "run `msd-hf regenerate`, then",
        ),
    ],
)
def test_bad_arguments_give_one_line(argv, message, monkeypatch, capsys):
    code, _, err = run_main(monkeypatch, capsys, "train", *argv)
    is_usage = any(text in message for text in ("Unknown arguments", "invalid int value", "invalid choice"))
    assert code == (2 if is_usage else 1) and message in " ".join(err.split()) and err.startswith("Error: ")


@pytest.mark.parametrize(
    "command, argv, message",
    [
        ("extract", ["--output", "features", "--storage", "int4"], "`storage` 'int4' is not known"),
        ("extract", ["--output", "features", "--target-layers", "low"], "`target_layers` must be numbers"),
        ("regenerate", ["--output", "there.jsonl"], "'there.jsonl' exists"),
        ("regenerate", ["--output", "out.json"], "must be a .jsonl file"),
    ],
)
def test_the_target_is_not_loaded_for_arguments_that_are_wrong(command, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("")
    code, _, err = run_main(monkeypatch, capsys, command, "--target", "nowhere", "--data", "there.jsonl", *argv)
    assert code == 1 and message in " ".join(err.split())


def test_unknown_name_in_a_yaml_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text("target: t\nlearning_rates: 3\n")
    code, _, err = run_main(monkeypatch, capsys, "train", "--config", tmp_path / "run.yaml")
    assert code == 1 and "unknown arguments: learning_rates" in err


def test_killed_in_stage_two_and_resumed_is_the_same_to_the_bit(folder, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "msd_hf", "train"]
    more = {"save-steps": 2, "max-steps": 14, "dataloader-num-workers": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, err = run_main(monkeypatch, capsys, "train", *arguments(folder, whole, **more))
    assert code == 0, err
    process = subprocess.Popen(
        [*command, *arguments(folder, cut, **more)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    # Stage 2 begins at step 7. The kill may come while any file is half-written.
    while not (cut / "checkpoint-8").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (cut / "checkpoint-14").exists()
    resume = arguments(folder, cut, **more, **{"resume-from-checkpoint": True})
    code, _, err = run_main(monkeypatch, capsys, "train", *resume)
    assert code == 0, err
    expected, got = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    shares = [entry["visual_share"] for entry in history(cut)]
    assert sum(shares[:7]) == 0 and sum(shares[7:]) > 0


def history(output):
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


EXAMPLES = Path(__file__).parent.parent / "examples"


def launch(config, *command):
    port = str(29500 + os.getpid() % 999)
    options = ["--config_file", EXAMPLES / "configs" / config, "--main_process_port", port]
    words = ["-m", "accelerate.commands.launch", *options, "--num_processes", 2, "--mixed_precision", "no", *command]
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("unroll_passes", "shard_target"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)]
)
def test_two_processes_have_the_losses_of_one(unroll_passes, shard_target, folder, tmp_path, monkeypatch, capsys):
    """Two processes share the global batch of one, and their losses agree over 50 steps in float32, noise included,
    also where each of them holds a half of the target's layers."""
    more = {"max-steps": 50, "save-steps": 50, "unroll-passes": unroll_passes}
    code, _, err = run_main(monkeypatch, capsys, "train", *arguments(folder, tmp_path / "one", **more))
    assert code == 0, err
    more |= {"per-device-train-batch-size": 2, "ddp-backend": "gloo", "shard-target": shard_target}
    result = launch("cpu.yaml", "-m", "msd_hf", "train", *arguments(folder, tmp_path / "two", **more))
    assert result.returncode == 0, result.stderr[-3000:]
    histories = [history(tmp_path / "one"), history(tmp_path / "two")]
    assert len(histories[0]) == 50
    for one, two in zip(*histories, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
        assert one["feature_loss"] == pytest.approx(two["feature_loss"], abs=1e-4)
        assert one["visual_share"] == two["visual_share"]
    provenance = json.loads((tmp_path / "two" / "training_provenance.json").read_text())
    assert provenance["num_processes"] == 2


@pytest.mark.slow  # DeepSpeed compiles its part for the CPU at its first run, which takes minutes
@pytest.mark.parametrize("config", ["fsdp.yaml", "zero2.yaml", "zero3.yaml"])
def test_a_draft_that_two_processes_shard_learns_the_same(config, folder, tmp_path, monkeypatch, capsys):
    if config != "fsdp.yaml":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    more = {"max-steps": 6, "save-steps": 3, "warmup-steps": 1}
    held_out = {"eval-data": folder / "data" / "test.json", "eval-prompts": 2, "eval-max-new-tokens": 6}
    code, _, err = run_main(monkeypatch, capsys, "train", *arguments(folder, tmp_path / "one", **more, **held_out))
    assert code == 0, err
    more |= {"per-device-train-batch-size": 2, "ddp-backend": "gloo", "use-cpu": None, "resume-from-checkpoint": True}
    for output in ("two", "cut"):
        command = arguments(folder, tmp_path / output, **more, **held_out)
        result = launch(config, EXAMPLES / "studies" / "sharded_cpu.py", "train", *command)
        assert result.returncode == 0, result.stderr[-3000:]
        if output == "two":  # the same run, as if it had been killed after its third step
            shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    one, two, cut = (history(tmp_path / output) for output in ("one", "two", "cut"))
    for step, (expected, got, resumed) in enumerate(zip(one, two, cut, strict=True)):
        assert expected["loss"] == pytest.approx(got["loss"], abs=1e-3), step
        assert resumed["loss"] == pytest.approx(got["loss"], abs=1e-5), step
    drafts = [MSDDraftModel.from_pretrained(tmp_path / output) for output in ("one", "two", "two/checkpoint-6", "cut")]
    for name, expected in drafts[1].state_dict().items():
        assert torch.equal(drafts[2].state_dict()[name], expected)
        for other in (drafts[0], drafts[3]):
            assert torch.allclose(other.state_dict()[name], expected, atol=1e-3), name
    metrics = [
        json.loads((tmp_path / name / "training_provenance.json").read_text())["metrics"] for name in ("one", "two")
    ]
    assert metrics[0]["eval_tau"] == pytest.approx(metrics[1]["eval_tau"], rel=0.05)


def test_the_example_runs(folder, tmp_path):
    script = Path(__file__).parent.parent / "examples" / "train_two_stage.py"
    fields = arguments(folder, tmp_path / "draft", **{"max-steps": 3, "eval-data": folder / "data" / "test.json"})
    result = subprocess.run([sys.executable, script, *fields], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert MSDDraftModel.from_pretrained(tmp_path / "draft").config.hidden_size == 64


def test_target_written_answers_are_made_once_and_trained_on(folder, tmp_path, monkeypatch, capsys):
    more = {"target-written-answers": True, "answer-max-new-tokens": 6, "max-steps": 2, "curriculum": "mixed"}
    output = tmp_path / "draft"
    for _ in range(2):
        code, _, err = run_main(monkeypatch, capsys, "train", *arguments(folder, output, **more))
        assert code == 0, err
    _, visual = sorted((output / "_answers").glob("*.jsonl"))
    assert len(list((output / "_answers").iterdir())) == 2  # pictures are not copied
    original = json.loads((folder / "data" / "visual.json").read_text())
    written = [json.loads(line) for line in visual.read_text().splitlines()]
    assert [sample["id"] for sample in written] == [sample["id"] for sample in original]
    assert written[0]["conversations"][0] == original[0]["conversations"][0]
    assert written[0]["conversations"][1] != original[0]["conversations"][1]


def test_extract_regenerate_and_check(folder, tmp_path, monkeypatch, capsys):
    data = ("--target", folder / "target", "--data", folder / "data" / "visual.json")
    code, out, err = run_main(monkeypatch, capsys, "extract", *data, "--output", tmp_path / "f", "--storage", "int8")
    assert code == 0 and "This will take" in out and "samples" in out, err
    answers = tmp_path / "answers.jsonl"
    code, out, err = run_main(monkeypatch, capsys, "regenerate", *data, "--output", answers, "--max-new-tokens", 4)
    assert code == 0 and "cut at the limit" in out, err
    broken = json.loads((folder / "data" / "visual.json").read_text())[:3]
    broken[1]["image"] = "images/none.png"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    check = ("--data", tmp_path / "broken.json", "--target", folder / "target", "--image-folder", folder / "data")
    code, out, err = run_main(monkeypatch, capsys, "data", "check", *check)
    assert code == 0 and "missing image" in out and broken[0]["conversations"][1]["value"][:12] in out, err
    code, _, err = run_main(monkeypatch, capsys, "data", "check", *check, "--strict")
    assert code == 1 and "none.png" in err
