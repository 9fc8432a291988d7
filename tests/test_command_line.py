"""What a user sees around the commands: version, help, completion, the next step and `msd-hf doctor`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
from transformers import GenerationMixin, TrainingArguments

from msd_hf import __version__, cli
from msd_hf.cli import bench_measurements, installed
from msd_hf.cli.next_step import print_next
from msd_hf.evaluation import METHODS
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.script import ScriptArguments
from msd_hf.training.script_help import GROUPS


def next_lines(err):
    return [line for line in err.splitlines() if line.startswith("next: ")]


def test_version(run):
    assert run("--version") == (0, f"msd-hf {__version__}\n", "")


def test_methods_of_the_help_are_those_of_the_benchmark():
    assert tuple(METHODS) == bench_measurements.BASELINES


class TestTrainHelp:
    def names(self, text):
        return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]

    def test_what_matters_comes_first_and_the_rest_on_demand(self, run):
        code, short, _ = run("train", "--help")
        assert code == 0 and self.names(short)[:3] == ["--target", "--text-data", "--visual-data"]
        code, whole, _ = run("train", "--help-all")
        assert code == 0 and self.names(whole)[: len(self.names(short))] == self.names(short)
        fields = {f.name for f in dataclasses.fields(MSDTrainingArguments) if f.init}
        listed = {name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in self.names(whole)}
        assert fields - listed == set()
        assert "--adam-epsilon" in whole and "--adam-epsilon" not in short and "--help-all" in short
        assert len(self.names(whole)) == len(set(self.names(whole)))
        assert "--decouple-visual-tokens" in short and "--no-decouple" not in whole

    def test_every_argument_of_ours_is_in_the_short_help(self, run):
        short = run("train", "--help")[1]
        ours = {f.name for f in dataclasses.fields(ScriptArguments)}
        ours |= {f.name for f in dataclasses.fields(MSDTrainingArguments)} - {
            f.name for f in dataclasses.fields(TrainingArguments)
        }
        listed = {name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in self.names(short)}
        assert ours - listed == set()
        assert {name for names in GROUPS.values() for name in names} - listed == set()


@pytest.mark.parametrize(
    "words, completed",
    [
        ("msd-hf do", ["doctor"]),
        ("msd-hf data ", ["check"]),
        ("msd-hf bench --ignore", ["--ignore-eos"]),
    ],
)
def test_shells_complete_commands_and_options(words, completed):
    asked = {"_MSD_HF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv = ['msd-hf']; from msd_hf.cli import main; main()"]
    result = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, completed, "")


class TestNextStep:
    def test_it_can_be_pasted_and_is_the_last_line_of_standard_error(self, capsys):
        print_next("bench", "--target", "my model", "--draft", "d'é")
        out, err = capsys.readouterr()
        assert out == "" and err == "next: msd-hf bench --target 'my model' --draft 'd'\"'\"'é'\n"
        print_next("bench", "--target", "a\n\x1b[31mb")
        assert capsys.readouterr().err.count("\n") == 1

    def test_standard_output_may_be_closed(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdout", None)
        print_next("demo")
        assert capsys.readouterr().err == "next: msd-hf demo\n"

    def test_commands_name_what_they_were_given(self, run, tmp_path):
        pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR)
        code, out, err = run("generate", *pair, "--text-only", "--prompt", "Count.", "--max-new-tokens", 4)
        assert code == 0 and "next" not in out
        assert err.splitlines()[-1].startswith(f"next: msd-hf bench --target {TARGET_DIR} --draft {DRAFT_DIR} --data")
        (tmp_path / "data.json").write_text(
            '[{"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
            '{"from": "gpt", "value": "A circle."}]}]'
        )
        (tmp_path / "a.png").write_bytes(DEMO_IMAGE.read_bytes())
        data = tmp_path / "data.json"
        code, _, err = run("data", "check", "--data", data, "--target", TARGET_DIR)
        both = f"--visual-data {data} --text-data TEXT.json"
        expected = f"next: msd-hf train --target {TARGET_DIR} {both} --output-dir DRAFT"
        assert code == 0 and next_lines(err) == [expected]
        code, _, err = run("regenerate", *pair[:2], "--data", data, "--output", tmp_path / "o.jsonl")
        assert code == 0 and next_lines(err) == [expected.replace("data.json", "o.jsonl")]
        code, _, err = run("convert", DRAFT_DIR, tmp_path / "copy")
        assert code == 0 and f"--draft {tmp_path / 'copy'}" in next_lines(err)[0]

    def test_a_failed_command_names_none(self, run):
        code, _, err = run("convert", "nowhere", "copy")
        assert code == 1 and not next_lines(err)


class Distribution:
    """The metadata of an installation, in place of ours."""

    def __init__(self, monkeypatch, requires, versions, names=("dev", "images", "all")):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        class Metadata:
            def get_all(self, key):
                return list(names)

        monkeypatch.setattr(installed.metadata, "requires", lambda name: requires)
        monkeypatch.setattr(installed.metadata, "version", version)
        monkeypatch.setattr(installed.metadata, "metadata", lambda name: Metadata())


REQUIRES = [
    "torch>=2.7",
    "never; python_version < '3'",
    'pillow; extra == "images"',
    'msd-hf[images]; extra == "all"',
    'matplotlib>=3; extra == "all"',
    'ruff; extra == "dev"',
]


class TestDoctor:
    def test_a_machine_on_which_everything_works(self, run, monkeypatch):
        Distribution(monkeypatch, REQUIRES, {"torch": "2.13.0+cpu", "pillow": "12.0"})
        code, out, err = run("doctor")
        assert code == 0, err
        rows = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert rows["msd-hf"].startswith(__version__) and rows["torch"] == "2.13.0+cpu (needs >=2.7)"
        assert rows["[images]"] == "installed" and rows["[all]"] == 'without matplotlib: pip install "msd-hf[all]"'
        assert "[dev]" not in rows and "never" not in rows
        assert rows["pair"].startswith("24 tokens in ") and rows["pair"].endswith("the same as without")
        assert rows["result"] == "everything works" and err.splitlines()[-1] == "next: msd-hf demo"

    def test_it_needs_no_extra(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, out, err = run("doctor")
        assert code == 0 and "everything works" in out, err

    def test_all_problems_are_named_with_what_mends_them(self, run, monkeypatch):
        Distribution(monkeypatch, [*REQUIRES, "safetensors"], {"torch": "2.6.0"})

        def without_a_gpu():
            raise RuntimeError("the driver is too old")

        monkeypatch.setattr(torch.cuda, "device_count", without_a_gpu)
        monkeypatch.setattr(GenerationMixin, "_assisted_decoding", lambda *args, **kwargs: None)
        monkeypatch.setattr(
            "msd_hf.loading.AutoModelForImageTextToText.from_pretrained", lambda *args, **kwargs: 1 / 0
        )
        code, out, err = run("doctor")
        (line,) = err.splitlines()
        assert code == 1 and line.startswith("Error: 5 problems found: ") and "everything works" not in out
        assert 'torch 2.6.0 is not >=2.7: pip install "torch>=2.7"' in line
        assert 'safetensors is missing: pip install "safetensors"' in line
        assert "the check of devices failed: RuntimeError: the driver is too old" in line
        assert "another library has replaced the hook" in line and "the check of the bundled pair failed" in line

    def test_a_missing_package_is_one_problem(self, run, monkeypatch):
        def missing():
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

        Distribution(monkeypatch, REQUIRES, {})
        monkeypatch.setattr(torch.cuda, "device_count", missing)
        monkeypatch.setattr("msd_hf.cli.doctor._pair", lambda: iter(()))
        code, _, err = run("doctor")
        assert code == 1 and err == 'Error: 1 problem found: torch is missing: pip install "torch>=2.7"\n'

    def test_other_tokens_are_a_problem(self, run, monkeypatch):
        monkeypatch.setattr(torch, "equal", lambda *args: False)
        code, _, err = run("doctor")
        assert code == 1 and "other tokens with its draft" in err

    def test_a_checkout_that_is_not_installed(self, run, monkeypatch):
        def missing(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr("msd_hf.cli.doctor._pair", lambda: iter(()))
        monkeypatch.setattr(installed.metadata, "requires", missing)
        monkeypatch.setattr(installed.metadata, "metadata", missing)
        code, out, err = run("doctor")
        assert code == 0 and "not installed (pip install" in out, err


def test_commands_are_listed_in_the_help(run):
    out = run("--help")[1]
    assert all(
        name in out for name in ("demo", "generate", "serve", "bench", "doctor", "train", "--install-completion")
    )
    assert cli.app.info.name == "msd-hf"
