"""The timer of the decoding loop's phases."""

import itertools

import pytest
from tiny import make_prompt, pair

from msd_hf.evaluation import phase_timer as phases
from msd_hf.evaluation.phase_timer import PhaseTimer
from msd_hf.observer import phase


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(phases.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_time_counts_for_the_innermost_phase(clock):
    with PhaseTimer() as timer:
        for _ in range(2):
            with phase("decode"):
                clock.now += 1
                with phase("tree"):
                    clock.now += 10
                    with phase("head"):
                        clock.now += 100
                    clock.now += 20
                clock.now += 2
        clock.now += 1000  # outside of any phase
    assert timer.inside("decode") == {"decode": 6, "tree": 60, "head": 200}
    assert timer.inside("prefill") == {}


def test_the_timer_does_not_count_itself(monkeypatch):
    """The fake clock advances by a second at each reading, and the timer reads it twice between phases."""
    clock = itertools.count()
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    with PhaseTimer() as timer, phase("decode"):
        for _ in range(3):
            with phase("tree"):
                pass
    assert timer.inside("decode") == {"decode": 4, "tree": 3}


def test_equal_phases_are_counted_apart_by_their_outer_phase(clock):
    with PhaseTimer() as timer:
        for outer, seconds in (("prefill", 5), ("decode", 7)):
            with phase(outer), phase("draft forward"):
                clock.now += seconds
    assert timer.inside("prefill")["draft forward"] == 5
    assert timer.inside("decode")["draft forward"] == 7


def test_clearing_keeps_the_current_phase(clock):
    with PhaseTimer() as timer, phase("decode"):
        clock.now += 5
        with phase("tree"):
            clock.now += 20
            timer.clear()
            clock.now += 300
        clock.now += 4000
    assert timer.inside("decode") == {"decode": 4000, "tree": 300}


def test_without_a_timer_phases_record_nothing(clock):
    assert phase("tree") is phase("head")
    timer = PhaseTimer()
    with phase("tree"):
        clock.now += 1
    assert timer.seconds == {}


def test_an_exception_ends_the_timing(clock):
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer, phase("decode"):
        clock.now += 3
        raise KeyError
    assert timer.inside("decode") == {"decode": 3}
    with phase("decode"):
        clock.now += 1
    assert timer.inside("decode") == {"decode": 3}
    with PhaseTimer(), pytest.raises(RuntimeError, match="Another"), PhaseTimer():
        pass


def test_every_part_of_a_round_is_a_phase_and_tokens_stay_the_same():
    target, draft = pair(0).target, pair(0).with_tree(10, 3, 3)
    inputs = make_prompt(1, images_at=(2,))
    expected = target.generate(**inputs, max_new_tokens=20, assistant_model=draft)
    with PhaseTimer() as timer:
        output = target.generate(**inputs, max_new_tokens=20, assistant_model=draft)
    assert output.tolist() == expected.tolist()
    parts = timer.inside("decode")
    assert set(parts) == {"decode", "tree", "draft forward", "draft head", "target forward", "verification", "cache"}
    assert all(seconds > 0 for seconds in parts.values())
    assert {"prefill", "draft forward"} <= set(timer.inside("prefill"))
