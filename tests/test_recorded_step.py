"""Tests when a step is called, recorded and replayed, with fake CUDA graphs that only log their calls."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from msd_hf.compiled.cuda_graphs import RecordedStep, Recorder, RecordingMemory


class FakeGraph:
    """Stands in for `torch.cuda.CUDAGraph` and logs its calls. Graph 0 is the one that keeps the recorder's memory."""

    fails: tuple[int, ...] = ()
    made = 0

    def __init__(self):
        self.number = FakeGraph.made
        FakeGraph.made += 1

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


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


LOG: list[str] = []


@pytest.fixture
def recorder(monkeypatch):
    LOG.clear()
    monkeypatch.setattr(FakeGraph, "fails", ())
    monkeypatch.setattr(FakeGraph, "made", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)
    return Recorder(torch.device("cuda"), RecordingMemory())


def make_step(recorder, name="call"):
    def function():
        LOG.append(name)
        return len(LOG)

    return RecordedStep(function, recorder)


def test_the_second_call_records_and_all_later_ones_replay(recorder):
    step = make_step(recorder)
    assert step() == step.result == 1
    assert step() == 5
    assert step() == step.result == 5  # a replay returns the recorded result; a real device overwrites its tensors
    assert LOG == ["call", "begin 0", "end", "begin 1", "call", "end", "replay 1", "replay 1"]
    assert step._graph.used_pool == "pool of 0" and gc.isenabled()


def test_steps_and_later_recorders_share_one_memory_pool(recorder):
    for _ in range(2):
        steps = [make_step(recorder), make_step(recorder)]
        for step in (*steps, *steps):
            step()
        assert [step._graph.used_pool for step in steps] == ["pool of 0"] * 2
        for step in steps:
            step.close()
        recorder.close()
        recorder = Recorder(recorder.device, recorder._memory)
    assert FakeGraph.made == 5


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_no_step_is_recorded_after_one_that_fails(recorder, monkeypatch, failing):
    """
    A step that is recorded later would keep reading the tensors of one call of the failed step, which makes new ones
    at every call. Steps that were recorded before the failure stay recorded.
    """
    monkeypatch.setattr(FakeGraph, "fails", (failing,))
    first = make_step(recorder, "first")
    second = RecordedStep(lambda: LOG.append("second") or first.result, recorder)
    for _ in range(3):
        first()
        assert second() == first.result
    assert (first._graph is not None) == (failing == 2) and second._graph is None
    assert not recorder.is_recording and gc.isenabled()
    recorder.close()
    assert not recorder._memory._arenas  # the state of its memory is unknown after a failed recording


@pytest.mark.parametrize("ends", [True, False])
def test_errors_of_the_function_are_not_hidden(recorder, monkeypatch, ends):
    calls = []

    def function():
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    step = RecordedStep(function, recorder)
    step()
    monkeypatch.setattr(FakeGraph, "fails", () if ends else (1,))
    with pytest.raises(KeyboardInterrupt):
        step()
    assert gc.isenabled()


def test_without_a_gpu_every_call_runs_the_function():
    calls = []
    recorder = Recorder(torch.device("cpu"), RecordingMemory())
    step = RecordedStep(lambda: calls.append(0), recorder)
    for _ in range(3):
        step()
    assert len(calls) == 3
    step.close()
    recorder.close()
