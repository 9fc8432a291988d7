"""Steps that are recorded on a GPU: when they are called, recorded and replayed, with graphs that do nothing."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from msd_hf.compiled.cuda_graphs import RecordedStep, Recorder, RecordingMemory


class Graph:
    """Notes what is done with it. The first one that is made is that of the memory."""

    fails: tuple[int, ...] = ()
    made = 0

    def __init__(self):
        self.number = Graph.made
        Graph.made += 1

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local" and not gc.isenabled()
        self.used_pool = pool
        LOG.append(f"begin {self.number}")

    def capture_end(self):
        LOG.append("end")
        if self.number in self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        LOG.append(f"replay {self.number}")

    def pool(self):
        return f"pool of {self.number}"


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


LOG: list[str] = []


@pytest.fixture
def recorder(monkeypatch):
    LOG.clear()
    monkeypatch.setattr(Graph, "fails", ())
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)
    return Recorder(torch.device("cuda"), RecordingMemory())


def step_of(recorder, name="call"):
    def function():
        LOG.append(name)
        return len(LOG)

    return RecordedStep(function, recorder)


def test_the_second_call_records_and_all_later_ones_replay(recorder):
    step = step_of(recorder)
    assert step() == step.result == 1
    assert step() == 5
    assert step() == step.result == 5  # which the device overwrites
    assert LOG == ["call", "begin 0", "end", "begin 1", "call", "end", "replay 1", "replay 1"]
    assert step._graph.used_pool == "pool of 0" and gc.isenabled()


def test_steps_and_later_recorders_share_the_memory(recorder):
    for _ in range(2):
        steps = [step_of(recorder), step_of(recorder)]
        for step in (*steps, *steps):
            step()
        assert [step._graph.used_pool for step in steps] == ["pool of 0"] * 2
        for step in steps:
            step.close()
        recorder.close()
        recorder = Recorder(recorder.device, recorder._memory)
    assert Graph.made == 5


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_no_step_is_recorded_behind_one_that_cannot_be(recorder, monkeypatch, failing):
    """It would go on reading what the other gave at that time. Those before it may be."""
    monkeypatch.setattr(Graph, "fails", (failing,))
    first = step_of(recorder, "first")
    second = RecordedStep(lambda: LOG.append("second") or first.result, recorder)
    for _ in range(3):
        first()
        assert second() == first.result
    assert (first._graph is not None) == (failing == 2) and second._graph is None
    assert not recorder.is_recording and gc.isenabled()
    recorder.close()
    assert not recorder._memory._arenas  # its memory is not trusted any more


@pytest.mark.parametrize("ends", [True, False])
def test_errors_of_the_function_are_not_hidden(recorder, monkeypatch, ends):
    calls = []

    def function():
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    step = RecordedStep(function, recorder)
    step()
    monkeypatch.setattr(Graph, "fails", () if ends else (1,))
    with pytest.raises(KeyboardInterrupt):
        step()
    assert gc.isenabled()


def test_elsewhere_it_is_called_each_time():
    calls = []
    recorder = Recorder(torch.device("cpu"), RecordingMemory())
    step = RecordedStep(lambda: calls.append(0), recorder)
    for _ in range(3):
        step()
    assert len(calls) == 3
    step.close()
    recorder.close()
