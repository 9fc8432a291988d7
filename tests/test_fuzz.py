"""Short forms of the fuzz studies: random command lines, and random broken samples. Longer ones run by hand."""

import fuzz_commands
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
    for number in range(1000, 1012):
        _, line = fuzz_commands.draw(commands, 0, number)
        outcome = fuzz_commands.run_case(line)
        assert fuzz_commands.problems_of(outcome) == [], (number, line, outcome)


def test_random_broken_samples_are_counted_and_the_good_ones_used(jobs):
    for number in range(1000, 1012):
        name, broken, outcome = fuzz_samples.run_case(jobs, 0, number)
        assert fuzz_samples.problems_of(outcome) == [], (number, name, broken, outcome)


def test_the_studies_notice_what_they_look_for(jobs, monkeypatch):
    outcome = fuzz_commands.run_case(["demo", "--seed", "x"])
    assert outcome.status == 2 and fuzz_commands.problems_of(outcome) == []
    monkeypatch.setattr(fuzz_commands.cli, "main", lambda: 1 / 0)
    assert "traceback" in fuzz_commands.problems_of(fuzz_commands.run_case(["demo"]))
    monkeypatch.setattr(fuzz_commands.cli, "main", lambda: print("x") or [0] * 3 * 10**8)
    assert "takes 2.4 GB" in fuzz_commands.problems_of(fuzz_commands.run_case(["demo"]))
    outcome = fuzz_commands.run_forked(lambda: fuzz_commands.os.read(fuzz_commands.os.pipe()[0], 1), seconds=0.2)
    assert "hangs for 20 s" in fuzz_commands.problems_of(outcome)
    monkeypatch.setitem(jobs.jobs, "check", lambda data: 2)
    found = {"check"} & {fuzz_samples.run_case(jobs, 0, number)[0] for number in range(8)}
    assert found
