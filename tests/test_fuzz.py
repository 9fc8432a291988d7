"""Short forms of the fuzz studies: random command lines, and random broken samples. Longer ones run by hand."""

import os
import sys

import fuzz_commands
import fuzz_runs
import fuzz_samples
import pytest


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return fuzz_commands.build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    fuzz_samples.write_images(folder)
    return fuzz_samples.Jobs(folder)


def test_random_command_lines_end_well(commands):
    for number in range(1000, 1008):
        _, line = fuzz_commands.draw(commands, 0, number)
        outcome = fuzz_commands.run_case(line)
        assert fuzz_commands.problems_of(outcome) == [], (number, line, outcome)


def test_random_broken_samples_are_counted_and_the_good_ones_used(jobs):
    for number in range(1000, 1008):
        name, broken, outcome = fuzz_samples.run_case(jobs, 0, number)
        assert fuzz_samples.problems_of(outcome) == [], (number, name, broken, outcome)


def test_the_studies_notice_what_they_look_for(jobs, monkeypatch):
    def end_of(main):
        monkeypatch.setattr(fuzz_commands.cli, "main", main)
        return fuzz_commands.problems_of(fuzz_commands.run_case(["demo"]))

    assert end_of(lambda: 1 / 0) == ["traceback", "status 70"]
    assert end_of(lambda: print(len(bytes(11 * 10**8)))) == ["takes 1.1 GB"]
    assert end_of(lambda: sys.exit(1)) == ["0 error lines"]
    assert end_of(lambda: print(f"an id {fuzz_commands.ESCAPE}")) == ["control characters"]
    outcome = fuzz_runs.run_forked(lambda: os.read(os.pipe()[0], 1), seconds=1.0)
    assert outcome.problems() == ["hangs for 20 s"] and "most recent call first" in outcome.errors
    for job, problem in ((lambda data: 2, "good samples were lost"), (lambda data: 1 / 0, "traceback")):
        monkeypatch.setattr(jobs, "jobs", {"check": job})
        assert fuzz_samples.problems_of(fuzz_samples.run_case(jobs, 0, 1)[2]) == [problem]
