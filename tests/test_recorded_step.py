"""Steps that are recorded on a GPU: when they are called, recorded and replayed, with graphs that do nothing."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from transformers.utils import logging

from msd_hf.recorded_step import RecordedStep


class Graph:
    fails = False

    def __init__(self):
        self.log = LOG

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert pool == "pool" and capture_error_mode == "thread_local" and not gc.isenabled()
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        self.log.append("replay")


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


LOG: list[str] = []


@pytest.fixture
def step(monkeypatch):
    LOG.clear()
    monkeypatch.setattr(Graph, "fails", False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def function():
        LOG.append("call")
        return len(LOG)

    return RecordedStep(function, torch.device("cuda"), "pool")


def test_the_second_call_records_and_all_later_ones_replay(step):
    assert step() == step.result == 1
    assert step() == 3
    assert step() == step.result == 3  # which the device overwrites
    assert LOG == ["call", "begin", "call", "end", "replay", "replay"]
    assert gc.isenabled()


def test_what_cannot_be_recorded_is_called_each_time(step, monkeypatch, caplog):
    monkeypatch.setattr(Graph, "fails", True)
    logging.get_logger("msd_hf").warning_once.cache_clear()
    results = [step() for _ in range(3)]
    assert LOG == ["call", "begin", "call", "end", "call", "call"] and results == [1, 5, 6]
    assert gc.isenabled()


def test_errors_of_the_function_are_not_hidden(step):
    def function():
        raise KeyError("of the target")

    step._function = function
    for _ in range(2):
        with pytest.raises(KeyError, match="of the target"):
            step()


def test_elsewhere_it_is_called_each_time():
    calls = []
    step = RecordedStep(lambda: calls.append(0), torch.device("cpu"))
    for _ in range(3):
        step()
    assert len(calls) == 3
    step.close()
