"""`msd-hf bench --lmms-eval`: which runs are compared, and what the table says about them."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from msd_hf.cli import app
from msd_hf.errors import MSDError
from msd_hf.evaluation.lmms_results import read_runs
from msd_hf.evaluation.lmms_table import compare_runs, lmms_tables


TARGET = "pretrained=org/target"


def write_run(folder, date, arguments, score=0.5, samples=(), task="chart", model="msd_llava", **config):
    """A run as lmms-eval 0.7.3 writes it. `samples`: (answer, record)."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {task: {"alias": task, "accuracy,none": score, "accuracy_stderr,none": "N/A"}},
        "config": {"model": model, "model_args": arguments, "offset": 0, "limit": None, "gen_kwargs": "", **config},
    }
    (folder / f"{date}_results.json").write_text(json.dumps(results), encoding="utf-8")
    lines = [
        json.dumps({"doc_id": i, "doc_hash": f"h{i}", "filtered_resps": answer, "token_counts": [record]})
        for i, (answer, record) in enumerate(samples)
    ]
    if lines:
        (folder / f"{date}_samples_{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def record(tokens, seconds, rounds=None, tau=None):
    counts = {"output_tokens": tokens, "seconds": seconds, "evaluation_seconds": seconds + 1.0}
    return counts if rounds is None else {**counts, "rounds": rounds, "tau": tau}


def compared(folder):
    (comparison,) = compare_runs(read_runs([folder]))
    return comparison


def test_a_task_is_compared_with_the_target_alone(tmp_path):
    write_run(tmp_path / "a b", "1", TARGET, 0.5, [("red", record(10, 4.0)), ("blue", record(30, 6.0))])
    drafted = [("red", record(10, 1.0, 5, 2.0)), ("green", record(30, 1.0, 10, 3.0))]
    write_run(tmp_path / "a b", "2", f"{TARGET},draft=my draft", 0.25, drafted)
    scores, speed = lmms_tables([compared(tmp_path)])
    assert "draft=my draft" in scores.title and "org/target" in scores.title
    assert scores.rows == [["chart", "accuracy", "0.5", "0.25", "no"]]
    # tau (5 * 2 + 10 * 3) / 15; 40 tokens in 2 instead of 10 seconds, and in 4 instead of 12.
    assert speed.rows == [["chart", "1/2", "20.0", "2.67", "5.00", "3.00"]]


def test_runs_of_other_settings_or_targets_are_not_compared(tmp_path):
    write_run(tmp_path, "1", f"{TARGET},preset=paper")
    write_run(tmp_path, "2", "pretrained=org/other")
    write_run(tmp_path, "3", TARGET, limit=5)
    write_run(tmp_path, "4", TARGET, model="llava_hf")
    write_run(tmp_path, "5", f"draft=d,{TARGET}")
    comparison = compared(tmp_path)
    assert comparison.alone is None
    scores, speed = lmms_tables([comparison])
    assert scores.rows == [["chart", "accuracy", "-", "0.5", "-"]] and speed.rows == [["chart", *5 * "-"]]
    assert "no run of the target alone" in comparison.notes()[0]


def test_the_order_of_arguments_does_not_matter_and_the_last_run_counts(tmp_path):
    write_run(tmp_path, "1", f"{TARGET},dtype=float32", 0.1)
    write_run(tmp_path, "2", f"dtype=float32,{TARGET}", 0.2)
    write_run(tmp_path, "3", {"pretrained": "org/target", "draft": "d", "dtype": "float32"}, 0.2)
    assert [row[2:] for row in lmms_tables([compared(tmp_path)])[0].rows] == [["0.2", "0.2", "yes"]]


def test_answers_without_a_record_are_named_and_left_out_of_the_speed(tmp_path):
    write_run(tmp_path, "1", TARGET, samples=[("a", record(10, 4.0)), ("b", record(10, 100.0))])
    write_run(tmp_path, "2", f"{TARGET},draft=d", samples=[("a", record(10, 2.0, 5, 2.0)), ("b", None)])
    comparison = compared(tmp_path)
    assert comparison.speedup("seconds") == 2.0 and comparison.tau() == 2.0
    assert "1 answers have no record" in comparison.notes()[0]


def test_each_draft_has_its_own_tables(tmp_path):
    write_run(tmp_path, "1", TARGET)
    for date, draft in ("2", "small"), ("3", "large"):
        write_run(tmp_path, date, f"{TARGET},draft={draft}")
    titles = [table.title for table in lmms_tables(compare_runs(read_runs([tmp_path])))]
    assert ["small" in titles[0], "large" in titles[2], len(titles)] == [True, True, 4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file or folder"),
        ("", "cannot be read as results of lmms-eval"),
        ("[]", "cannot be read as results of lmms-eval"),
        ('{"config": {"model": "msd_llava"}}', "cannot be read as results of lmms-eval"),
        ('{"config": {"model": "gpt4v"}, "results": {}}', "1 files of results, none of a model of msd-hf"),
    ],
)
def test_what_is_no_result_is_refused_in_one_sentence(tmp_path, content, sentence):
    file = tmp_path / "1_results.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(MSDError, match=sentence):
        read_runs([file])


def test_a_folder_without_results_and_runs_without_a_draft_are_refused(tmp_path):
    with pytest.raises(MSDError, match="no file"):
        read_runs([tmp_path])
    write_run(tmp_path, "1", TARGET)
    with pytest.raises(MSDError, match="No run has a draft"):
        compare_runs(read_runs([tmp_path]))


def test_the_command_prints_tables_and_notes(tmp_path):
    write_run(tmp_path, "1", TARGET)
    write_run(tmp_path, "2", f"{TARGET},draft=d")
    result = CliRunner().invoke(app, ["bench", "--lmms-eval", str(tmp_path)])
    assert result.exit_code == 0
    assert re.search(r"chart +│ accuracy │ +0.5 │ +0.5 │ +yes", result.output)
    assert "Add --log_samples to both" in result.output
    refused = CliRunner().invoke(app, ["bench", "--lmms-eval", str(tmp_path), "--output", "x"])
    assert isinstance(refused.exception, MSDError)
