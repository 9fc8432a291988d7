"""`msd-hf bench --compare`: reports side by side, on the prompts that all of them hold."""

from __future__ import annotations

import copy
import json

import pytest

from msd_hf.errors import MSDError
from msd_hf.evaluation.report_comparison import compare_reports
from msd_hf.evaluation.saved_report import SavedReport, read_reports


def prompt(name, alone, drafted, lengths, answer="Yes."):
    return {
        "name": name,
        "group": "text",
        "prompt_tokens": 9,
        "new_tokens": 10,
        "seconds": {"vanilla": [alone, alone], "tree": [drafted, drafted]},
        "acceptance_lengths": {"tree": lengths},
        "question": f"{name}?",
        "answers": {"vanilla": "Yes.", "tree": answer},
    }


def report(prompts, **changes):
    content = {
        "kind": "pair",
        "environment": {
            "command": "msd-hf bench",
            "versions": {"torch": "2.13"},
            "device": "CPU",
            "cpu_cores": 2,
            "threads": 1,
            "dtype": "float32",
            "attention": "sdpa",
            "system": "Linux",
        },
        "pair": {"target": "llava", "draft": "first", "target_fingerprint": {"head": "ab" * 64}},
        "settings": {"repeats": 2},
        "methods": {"vanilla": {}, "tree": {}},
        "prompts": prompts,
    }
    for part, values in changes.items():
        content[part] = {**content[part], **values}
    return content


FIRST = report([prompt("a", 4.0, 2.0, [4, 5]), prompt("b", 4.0, 1.0, [9]), prompt("only here", 4.0, 4.0, [1])])
SECOND = report([prompt("b", 2.0, 0.25, [9], "No."), prompt("a", 2.0, 0.5, [6, 3])], pair={"draft": "second"})


def compared(*contents):
    return compare_reports([SavedReport(name, content) for name, content in zip("xyz", contents, strict=False)])


def rows(table):
    return {row[0]: row[1:] for row in table.rows}


def test_figures_are_of_the_common_prompts():
    found = compared(FIRST, SECOND)
    assert found.num_prompts == 2
    figures, texts, others = found.tables
    assert figures.header == ("", "x", "y")
    assert rows(figures) == {
        "tokens/s, vanilla": ["2.5", "5.0"],
        "tokens/s, tree": ["6.7", "26.7"],  # 40 tokens in 6 and in 1.5 seconds
        "speedup, tree": ["3.00", "6.00"],
        "tau, tree": ["6.00", "6.00"],
    }
    assert rows(texts) == {"vanilla": ["2/2 (100.0%)", "2/2 (100.0%)"], "tree": ["2/2 (100.0%)", "1/2 (50.0%)"]}
    assert rows(others) == {"draft": ["first", "second"]}
    assert found.notes == [
        "2 prompts are in all reports; up to 1 others are left out.",
        "Hardware, versions and target are the same.",
    ]


def test_what_differs_is_said():
    other = report(
        SECOND["prompts"],
        environment={"device": "H200", "versions": {"torch": "2.14", "msd_hf": "1"}},
        settings={"repeats": 3},
        pair={"target_fingerprint": {"head": "cd" * 64}},
    )
    found = compared(SECOND, other, SECOND)
    assert rows(found.tables[2]) == {
        "device": ["CPU", "H200", "CPU"],
        "draft": ["second", "first", "second"],
        "torch": ["2.13", "2.14", "2.13"],
        "msd_hf": ["-", "1", "-"],
        "repeats": ["2", "3", "2"],
        "target's weights": ["those compared with", "other", "the same"],
    }
    notes = " ".join(found.notes)
    assert "The hardware differs (device)" in notes and "Versions differ: msd_hf, torch." in notes
    assert "The targets differ" in notes and "are the same" not in notes
    # Another dtype turns a few signs of tiny values; that is no other target.
    nearly = report(SECOND["prompts"], pair={"draft": "second", "target_fingerprint": {"head": "ab" * 63 + "aa"}})
    assert len(compared(SECOND, nearly).tables) == 2


def test_reports_without_texts_or_with_other_methods():
    silent = copy.deepcopy(SECOND)
    for found in silent["prompts"]:
        del found["question"], found["answers"]
    del silent["pair"]
    more = copy.deepcopy(FIRST)
    more["methods"]["chain"] = {}
    for found in more["prompts"]:
        found["seconds"]["chain"], found["acceptance_lengths"]["chain"] = [1.0, 1.0], []
    found = compared(more, silent)
    assert rows(found.tables[0])["tokens/s, chain"] == ["10.0", "-"]
    assert rows(found.tables[0])["tau, chain"] == ["-", "-"]
    assert rows(found.tables[1])["tree"] == ["2/2 (100.0%)", "-"]
    assert any(note.startswith("No texts are in y") for note in found.notes)


def test_another_question_of_the_same_name_is_another_prompt():
    other = copy.deepcopy(SECOND)
    other["prompts"][0]["question"] = "Something else?"
    assert compared(FIRST, other).num_prompts == 1
    other["prompts"][1]["question"] = "Something else?"
    with pytest.raises(MSDError, match="no prompt in common"):
        compared(FIRST, other)


def test_the_command_prints_it(run, tmp_path):
    for folder, content in (("one", FIRST), ("two", SECOND)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.json").write_text(json.dumps(content))
    files = (tmp_path / "one", tmp_path / "two" / "report.json", tmp_path / "one" / "report.json")
    code, out, err = run("bench", "--compare", *files)
    assert code == 0, err
    shown = [line.split() for line in out.splitlines()]
    assert ["speedup,", "tree", "│", "3.00", "│", "6.00", "│", "3.00"] in shown
    assert "one (2)" in out and "Hardware, versions and target are the same." in out
    assert err.startswith("next: msd-hf bench ")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no report of `msd-hf bench --output`: it is not JSON"),
        ("[1]", "it does not say what it measured"),
        ('{"kind": "shape"}', "is a report of --shape, which has no prompts"),
        ('{"kind": "pair"}', "a part of it is missing or broken"),
        (json.dumps({**FIRST, "prompts": []}), "a part of it is missing or broken"),
        (json.dumps({**FIRST, "prompts": [{**FIRST["prompts"][0], "seconds": {"vanilla": [1]}}]}), "a part of it is"),
        (json.dumps({**FIRST, "prompts": [{**FIRST["prompts"][0], "name": 3}]}), "a part of it is missing or broken"),
        (json.dumps({**FIRST, "environment": []}), "a part of it is missing or broken"),
        (json.dumps({**FIRST, "pair": 3}), "a part of it is missing or broken"),
        (b"\xff\xfe", "it is not JSON"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_report_is_refused_in_one_sentence(content, message, run, tmp_path):
    (tmp_path / "good.json").write_text(json.dumps(FIRST))
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MSDError, match=message):
        read_reports([tmp_path / "good.json", path])
    code, out, err = run("bench", "--compare", tmp_path / "good.json", path)
    assert code == 1 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--compare", "good.json"), "A comparison needs two reports or more"),
        (("--compare",), "A comparison needs two reports or more"),
        (("good.json",), "'good.json' is given without an option: add --compare"),
        (("--compare", "good.json", "good.json", "--toy"), "leave the other options out"),
        (("--compare", "good.json", "good.json", "--html", "x.html"), "leave the other options out"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.json").write_text(json.dumps(FIRST))
    code, _, err = run("bench", *arguments)
    assert code == 1 and message in err
