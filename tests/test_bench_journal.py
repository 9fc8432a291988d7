"""A benchmark that was killed goes on with the prompts that it has not measured."""

from __future__ import annotations

import json

import pytest

from msd_hf.evaluation import bench as bench_module
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


FEW = ("--num-prompts", 4, "--repeats", 1, "--max-new-tokens", 8, "--baseline", "vanilla")
TOY = ("bench", "--toy", "--target", TARGET_DIR, "--draft", DRAFT_DIR)


@pytest.fixture
def measured(monkeypatch):
    """The lengths of the prompts that were measured, warm-up left out. Set `fails_at` to fail at one of them."""
    compare = bench_module.compare

    class Measured(list):
        fails_at = None

    lengths = Measured()

    def noting(target, draft, inputs, repeats, **arguments):
        if arguments["max_new_tokens"] == 8 and (not lengths.warm):
            lengths.warm = True
        else:
            if len(lengths) == lengths.fails_at:
                raise KeyboardInterrupt
            lengths.append(inputs["input_ids"].shape[1])
        return compare(target, draft, inputs, repeats, **arguments)

    lengths.warm = False
    monkeypatch.setattr(bench_module, "compare", noting)
    return lengths


def test_a_killed_benchmark_goes_on(run, tmp_path, measured, caplog):
    measured.fails_at = 2
    code, _, _ = run(*TOY, *FEW, "--output", tmp_path / "out")
    assert code == 130 and "2 prompts are kept in" in caplog.text and "the same command goes on there" in caplog.text
    assert len(measured) == 2 and not (tmp_path / "out" / "report.json").exists()
    journal = tmp_path / "out" / "report-results.partial-0"
    with open(journal, "a") as file:
        file.write('{"number": 2, "res')  # a line that was being written
    first, measured.fails_at, measured.warm = list(measured), None, False
    code, _, err = run(*TOY, *FEW, "--output", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not journal.exists() and len(measured) == 4  # each prompt once
    assert [prompt["prompt_tokens"] for prompt in report["prompts"]] == measured
    assert measured[:2] == first and all(prompt["question"] for prompt in report["prompts"])
    assert all(len(set(prompt["answers"].values())) == 1 for prompt in report["prompts"])


def test_results_of_other_settings_are_no_part_of_a_report(run, tmp_path, measured):
    measured.fails_at = 1
    run(*TOY, *FEW, "--output", tmp_path)
    measured.fails_at, measured.warm = None, False
    code, _, err = run(*TOY, *FEW, "--temperature", 0.5, "--output", tmp_path)
    assert code == 1 and "was begun with other settings: temperature (0.0 -> 0.5)" in err and len(measured) == 1


def test_without_a_folder_nothing_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*TOY, "--num-prompts", 1, "--repeats", 1, "--max-new-tokens", 2, "--baseline", "vanilla")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == []
