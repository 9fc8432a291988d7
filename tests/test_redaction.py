"""Secrets and local paths are removed, however an argument is called and written."""

import json

import pytest

from msd_hf.training import MSDTrainingArguments
from msd_hf.training.script import ScriptArguments
from msd_hf.writing.redaction import is_secret_name, redact, redact_command, redact_text, secret_values


SECRET = "opensesame-1"
HOME = "/home/somebody"

SECRET_NAMES = [
    "hub_token",
    "hub-token",
    "token",
    "HF_TOKEN",
    "hubToken",
    "push_to_hub_token",
    "api_key",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "apikey",
    "AWS_SECRET_ACCESS_KEY",
    "access_key",
    "private_key_pem",
    "password",
    "db_password",
    "PGPASSWORD",
    "passwd",
    "passphrase",
    "client_secret",
    "secrets",
    "credentials",
    "X-Amz-Signature",
    "auth",
    "authorization",
    "access_tokens",
    "sig",
]
PLAIN_NAMES = [
    "num_assistant_tokens",
    "max_new_tokens",
    "eos_token_id",
    "token_loss_weight",
    "average_tokens_across_devices",
    "hub_model_id",
    "unroll_passes",
    "learning_rate",
    "target",
    "keyboard",
    "monkey",
    "author",
    "include_num_input_tokens_seen",
    "answer_max_new_tokens",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_known_by_its_name(name):
    assert is_secret_name(name)
    dashed = name.replace("_", "-")
    for argv in (
        [f"--{name}", SECRET],
        [f"--{dashed}", SECRET, "--bf16"],
        [f"--{name}={SECRET}"],
        [f"--{name}", f"-{SECRET}"],
        [f"--{name}", "two", SECRET],
        ["--settings", json.dumps({name: SECRET})],
        ["--settings", json.dumps({"inner": [{name: {"value": SECRET}}]})],
        ["--settings", str({name: f"two {SECRET}"})],
        ["--settings", f"{name}={SECRET},other=1"],
        ["--settings", f"{name}: {SECRET}"],
        ["--settings", json.dumps(json.dumps({name: SECRET}))],
        [f"accelerate launch train --{dashed} {SECRET} --bf16"],
    ):
        assert SECRET not in redact_command(["train.py", *argv]), argv
    assert redact({"a": [{name: SECRET}], "b": ({name: 7},)}) == {
        "a": [{name: "<redacted>"}],
        "b": ({name: "<redacted>"},),
    }
    assert redact({name: None}) == {name: None} and redact({name: True}) == {name: True}
    assert secret_values({"a": {name: SECRET}}) == secret_values({name: [{"deep": SECRET}]}) == {SECRET}


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_ordinary_settings_are_kept(name):
    assert not is_secret_name(name)
    assert redact_command(["train", f"--{name}", "60", f"--{name}=auto"]) == f"train --{name} 60 --{name}=auto"
    assert redact({name: 60}) == {name: 60}


def test_only_the_tokens_of_the_hub_are_secret_among_our_arguments():
    names = {*MSDTrainingArguments.__dataclass_fields__, *ScriptArguments.__dataclass_fields__}
    assert {name for name in names if is_secret_name(name)} <= {"hub_token", "push_to_hub_token"}


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"https://me:{SECRET}@host/org/data.json", "https://<redacted>@host/org/data.json"),
        (f"https://me:{SECRET}/#?@host:80/data", "https://<redacted>@host:80/data"),
        (f"https://{SECRET}@host", "https://<redacted>@host"),
        (f"git+ssh://me:{SECRET}@host/x", "git+ssh://<redacted>@host/x"),
        (f"me:{SECRET}@proxy:3128", "<redacted>@proxy:3128"),
        (f"https://host/data.json?download=1&X={SECRET}", "https://host/data.json?<redacted>"),
        (f"https://host/data.json#{SECRET}", "https://host/data.json#<redacted>"),
        (f"see https://me:{SECRET}@host/x, then", "see https://<redacted>@host/x, then"),
        (f"Authorization: Bearer {SECRET}", "Authorization: <redacted> <redacted>"),
        ("with hf_aBcDeFgHiJkLmN and sk-proj-0123456789abcdef", "with <redacted> and <redacted>"),
        ("ghp_0123456789abcdefghij", "<redacted>"),
    ],
)
def test_a_secret_is_known_by_its_form(text, expected):
    shown = redact_text(text)
    assert SECRET not in shown
    assert shown == expected or text.startswith("Authorization")


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"{HOME}/data/text.json", "text.json"),
        (f"{HOME}/my data/text file.json", "text file.json"),
        (f"{HOME}/data/", "data"),
        (f"file://{HOME}/data/x.json", "x.json"),
        (f"~{HOME}/x", "x"),
        ("~/data/x.json", "x.json"),
        (f"../..{HOME}/x.json", "x.json"),
        (f"a/../..{HOME}/x.json", "x.json"),
        (f"x={HOME}/a.json,y={HOME}/b.json", "x=a.json,y=b.json"),
        (f"cannot read {HOME}/a.json: no such file", "cannot read a.json: no such file"),
        (r"C:\Users\somebody\x.json", "x.json"),
        (r"\\server\somebody\x.json", "x.json"),
        (json.dumps({"path": f"{HOME}/my data/x"}), json.dumps({"path": "x"})),
        (json.dumps({f"{HOME}/name": 1}), json.dumps({"name": 1})),
    ],
)
def test_a_local_path_becomes_its_last_component(text, expected):
    assert redact_text(text) == expected
    assert "somebody" not in redact_command(["train", "--data", text, f"--data={text}"])


@pytest.mark.parametrize(
    "text",
    [
        *("", "org/model", "./data/x.json", "data/x.json", "https://host/org/data.json", "http://[::1]:80/x", "a / b"),
        *("s3://bucket/data/x", "1e-3", "60", "5, 1", "two words", "key", "https://host/@me/x", "12:30", "a:b"),
    ],
)
def test_other_text_stays(text):
    assert redact_text(text) == text == redact(text)


def test_values_of_secret_variables_are_found_anywhere(monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", SECRET)
    monkeypatch.setenv("SERVICE_NAME", "training")
    assert redact_text(f"run-{SECRET}-of training") == "run-<redacted>-of training"
    assert redact({"a": {f"name of {SECRET}": f"{SECRET}!"}}) == {"a": {"name of <redacted>": "<redacted>!"}}


def test_secrets_that_are_known_are_found_anywhere():
    assert redact_command(["train", "--name", f"x{SECRET}x"], [SECRET]) == "train --name 'x<redacted>x'"


def test_what_is_redacted_stays_the_same_when_it_is_redacted_again():
    settings = {"token": SECRET, "data": [f"{HOME}/x", f"https://a:{SECRET}@host/x?y"], "n": 3, "x": None, "z": 0.5}
    assert redact(redact(settings)) == redact(settings)
