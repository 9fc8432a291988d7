"""Whatever is wrong, a command ends with one line that says so and an exit status that a script can read."""

import io
import os
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from fuzz_runs import run_forked

from msd_hf import cli
from msd_hf.cli import answer
from msd_hf.cli.failures import exit_status
from msd_hf.errors import MSDError
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


def error_line(err):
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_an_error_is_printed_as_it_is(run, monkeypatch):
    def fail(*args):
        raise MSDError('pip install "msd-hf[bench]" [/b] [bold]b\n  \x1b[31m\udcff')

    monkeypatch.setattr(answer, "_run", fail)
    code, _, err = run("demo")
    assert code == 1 and err == 'Error: pip install "msd-hf[bench]" [/b] [bold]b ␛[31m\\udcff\n'


def test_an_unknown_error_says_where_its_traceback_is(run, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*args):
        raise KeyError("a" * 5000)

    monkeypatch.setattr(answer, "_run", fail)
    code, _, err = run("demo")
    line = error_line(err)
    assert code == 1 and line.startswith("Error: KeyError: 'aaa") and len(line) < 1200
    assert code == 1
    (path,) = tmp_path.iterdir()
    assert line.endswith(f"(the traceback is in {path})") and path.stat().st_mode & 0o077 == 0
    assert "Traceback (most recent call last)" in path.read_text() and "in fail" in path.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert error_line(run("demo")[2]).endswith("(the traceback could not be written: No such file or directory)")


def test_a_traceback_holds_no_secret_and_no_local_path(run, monkeypatch, tmp_path):
    """Users publish tracebacks in reports."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", "of the environment")

    def fail(*args):
        sys.argv += ["--hub-token", "of the command line"]
        raise KeyError("of the environment, of the command line, /home/somebody/data.json")

    monkeypatch.setattr(answer, "_run", fail)
    run("demo")
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert "KeyError" in text and "data.json" in text and "in fail" in text
    assert not any(part in text for part in ("of the environment", "of the command line", "/home/", str(tmp_path)))


def test_an_interrupt_gives_130(run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer, "_run", interrupt)
    code, _, err = run("demo")
    assert code == 130 and err == "Error: Interrupted.\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["demo", "--no-such-option"],
        ["demo", "--seed", "x"],
        ["demo", "--seed", "-1"],
        ["demo", "--seed", str(2**32)],
        ["demo", "--temperature", "nan"],
        ["demo", "--temperature", "inf"],
        ["no-such-command"],
        ["generate"],
        ["data"],
        [],
    ],
)
def test_a_command_line_that_cannot_be_read_gives_2(argv, run):
    code, _, err = run(*argv)
    line = error_line(err)
    assert code == 2 and ("--help` lists the options" in line or not argv or argv == ["data"])


@pytest.mark.parametrize(
    "command, status",
    [
        (lambda: cli.app(["demo", "--repeats", "1", "--max-new-tokens", "4"]), 1),
        (lambda: cli.app(["train", "--help"]), 0),
        (lambda: print("a line that is still in the buffer"), 1),
    ],
    ids=["demo", "help", "buffer"],
)
def test_a_reader_that_leaves_is_no_error(command, status):
    def case():
        reader, writer = os.pipe()
        os.close(reader)  # as `head` does
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        return exit_status(lambda standalone_mode: command())

    outcome = run_forked(case)
    assert outcome.status == status
    assert not any(text in outcome.errors for text in ("Error", "Traceback", "Exception ignored")), outcome.errors


def test_an_output_that_was_closed_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_status(lambda standalone_mode: 0) == 0


def test_an_output_without_unicode_is_no_error(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["msd-hf", "demo", "--repeats", "1", "--max-new-tokens", "12"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 0 and b"\\u2039" in output.buffer.getvalue()


@pytest.fixture
def target(tmp_path):
    shutil.copytree(TARGET_DIR, tmp_path / "target")
    return tmp_path / "target"


def spoil(target, case):
    if case == "a file":
        shutil.rmtree(target)
        target.write_text("{}")
    elif case == "empty":
        shutil.rmtree(target)
        target.mkdir()
    elif case == "cut weights":
        content = (target / "model.safetensors").read_bytes()
        (target / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif case == "empty weights":
        (target / "model.safetensors").write_bytes(b"")
    elif case == "other sizes":
        config = (target / "config.json").read_text()
        (target / "config.json").write_text(config.replace('"intermediate_size": ', '"intermediate_size": 1'))
    elif case == "config of bytes":
        (target / "config.json").write_bytes(b'{"a": "\xff"}')
    elif case == "config of a list":
        (target / "config.json").write_text("[]")
    elif case == "code of its own":
        (target / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    elif case == "cut tokenizer":
        (target / "tokenizer.json").write_bytes((target / "tokenizer.json").read_bytes()[:2000])
    elif case == "template without an end":
        (target / "chat_template.jinja").write_text("{% for message in messages %}")
    elif case == "template that divides by 0":
        (target / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    elif case == "template of other types":
        (target / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    elif case == "missing package":
        (target / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')


@pytest.mark.parametrize(
    "case, message",
    [
        ("a file", "The config of the target"),
        ("empty", "The config of the target"),
        ("cut weights", "The weights of the target .* cannot be loaded: SafetensorError"),
        ("empty weights", "The weights of the target .* cannot be loaded: SafetensorError"),
        ("other sizes", "The weights of the target .* cannot be loaded"),
        ("config of bytes", "The config of the target"),
        ("config of a list", "The config of the target"),
        ("code of its own", "The config of the target .* custom code"),
        ("cut tokenizer", "The processor of the target"),
        ("template without an end", r"chat template fails \(TemplateSyntaxError\)"),
        ("template that divides by 0", r"chat template fails \(ZeroDivisionError\)"),
        ("template of other types", r"chat template fails \(TypeError\)"),
    ],
)
def test_a_broken_target_is_one_line(case, message, run, target):
    spoil(target, case)
    pair = ("--target", target, "--draft", DRAFT_DIR)
    code, _, err = run("generate", *pair, "--text-only", "--prompt", "Count.", "--max-new-tokens", 2)
    line = error_line(err)
    assert code == 1 and re.search(message, line) and "traceback is in" not in line


def test_code_of_a_target_is_not_run_and_nobody_is_asked(run, target, monkeypatch):
    (target / "mine.py").write_text("raise SystemExit('the code ran')")
    spoil(target, "code of its own")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")  # transformers asks in a terminal
    code, _, err = run("generate", "--target", target, "--draft", DRAFT_DIR, "--text-only", "--prompt", "Count.")
    assert code == 1 and "custom code" in error_line(err) and not asked


@pytest.mark.parametrize("case", ["template without an end", "template that divides by 0", "template of other types"])
def test_a_broken_template_is_one_line_before_any_sample_is_read(case, run, target, tmp_path):
    spoil(target, case)
    (tmp_path / "data.jsonl").write_text('{"conversations": 3}\n')
    code, out, err = run("data", "check", "--target", target, "--data", tmp_path / "data.jsonl")
    assert code == 1 and "does not show where an answer begins: the chat template" in error_line(err) and not out


@pytest.mark.parametrize("device, dtype", [("meta", "auto"), ("cpu", "float8_e4m3fn"), ("cpu", "int8"), ("", "auto")])
def test_devices_and_dtypes_that_compute_nothing_are_refused(device, dtype, run):
    pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR, "--device", device, "--dtype", dtype)
    code, _, err = run("generate", *pair, "--text-only", "--prompt", "Count.")
    assert code == 1 and re.search("cannot be used on this machine|is not known", error_line(err))


@pytest.mark.parametrize(
    "missing, line",
    [
        (ModuleNotFoundError("No module named 'torchvision.io'", name="torchvision.io"), "pip install torchvision"),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), "pip install pillow"),
        (PackageNotFoundError("The 'safetensors>=0.4.3' distribution was not found"), "pip install safetensors"),
        (ImportError("\nA requires the PIL library.\nYou can install it with pip:\n`pip install pillow`"), "`pip ins"),
    ],
)
def test_a_missing_package_is_one_line_with_its_command(missing, line, run, monkeypatch):
    def fail(*args, **kwargs):
        raise missing

    monkeypatch.setattr("msd_hf.loading.AutoProcessor.from_pretrained", fail)
    code, _, err = run("demo")
    assert code == 1 and line in error_line(err) and "The processor of the target" in error_line(err)


def test_pictures_without_pillow_are_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, _, err = run("demo", "--image", DEMO_IMAGE)
    assert code == 1 and 'pip install "msd-hf[images]"' in error_line(err)


def test_an_answer_of_one_token_has_no_tau(run):
    code, out, _ = run("demo", "--repeats", 1, "--max-new-tokens", 1)
    assert code == 0 and "nan" not in out and "needs no draft" in out


def test_a_prompt_that_is_not_unicode_is_one_line(run):
    code, _, err = run("demo", "--prompt", os.fsdecode(b"What is \xff?"))
    assert code == 1 and "is not valid Unicode" in error_line(err)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num-train-epochs", "-3"),
        ("num-train-epochs", "nan"),
        ("per-device-train-batch-size", "0"),
        ("gradient-accumulation-steps", "0"),
        ("learning-rate", "nan"),
        ("noise", "inf"),
        ("seed", "-1"),
        ("dataloader-num-workers", "-1"),
        ("answer-batch-size", "0"),
    ],
)
def test_training_arguments_out_of_range_are_one_line(name, value, run):
    argv = ("--target", TARGET_DIR, "--text-data", "a.json", "--curriculum", "text", "--report-to", "none")
    code, _, err = run("train", *argv, f"--{name}={value}")
    assert code == 1 and name.replace("-", "") in error_line(err).replace("-", "").replace("_", "")
