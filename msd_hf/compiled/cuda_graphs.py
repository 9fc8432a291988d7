"""Work that is the same each time, as CUDA graphs."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Result = TypeVar("Result")


class Recorder:
    """
    What steps share that run one after the other, each with what those before it gave. On a GPU their graphs lie in
    one memory, which later recorders of the device use again. With the first step that cannot be recorded all
    recording ends: a graph must not read what is made anew each time.

    Args:
        device (`torch.device`): where the steps run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_recording = device.type == "cuda"
        self._room: _Room | None = None

    def record(self, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result] | None:
        """
        Calls a function while the device does nothing but note what it would have to do. `None` where that is not
        possible.
        """
        current = torch.cuda.current_stream(self.device)
        try:
            if self._room is None:
                self._room = _spare_rooms[self.device].pop() if _spare_rooms[self.device] else _Room(self.device)
            self._room.stream.wait_stream(current)
            graph, result = _captured(function, self._room.stream, self._room.pool)
        except RuntimeError as error:  # something in the target waits for the device
            self.is_recording = False
            self._room = None  # who knows what state it is in
            logger.warning_once(
                f"A round could not be recorded as a CUDA graph, and runs more slowly without: {error}"
            )
            return None
        current.wait_stream(self._room.stream)
        return graph, result

    def close(self) -> None:
        """Leaves the memory to the next one."""
        if self._room is not None:
            _spare_rooms[self.device].append(self._room)
            self._room = None


class RecordedStep(Generic[Result]):
    """
    A function that takes nothing and does not wait for the device. What it reads and writes stays where it is, or is
    what earlier steps of the recorder gave. On a GPU it is called once as it is, for whatever has to be made ready;
    then it is recorded, and replayed from then on. Elsewhere it is called each time.

    Args:
        function (`Callable`): what is done.
        recorder (`Recorder`): shared with the other steps of a round.

    Attributes:
        result: what the function gave. Tensors that a recorded function made are overwritten each time.
    """

    result: Result

    def __init__(self, function: Callable[[], Result], recorder: Recorder):
        self._function = function
        self._recorder = recorder
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_ready = False

    def __call__(self) -> Result:
        if self._graph is None and self._is_ready and self._recorder.is_recording:
            recorded = self._recorder.record(self._function)
            if recorded is not None:
                self._graph, self.result = recorded
        if self._graph is not None:
            self._graph.replay()
        else:
            self.result = self._function()
            self._is_ready = True
        return self.result

    def close(self) -> None:
        """Lets go of what was recorded, which a reference to itself would keep until garbage is collected."""
        self._graph = None
        del self._function


class _Room:
    """A stream to record on, and memory for what is recorded. A graph of its own, of nothing much, keeps the memory
    when the others are gone: it would not be used again, nor given back before all other memory is taken."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._graph, self._kept = _captured(lambda: torch.zeros(1, device=device), self.stream, None)
        self.pool = self._graph.pool()


_spare_rooms: defaultdict[torch.device, list[_Room]] = defaultdict(list)


def _captured(
    function: Callable[[], Result], stream: torch.cuda.Stream, pool: object
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Not `torch.cuda.graph`, which collects garbage first: that takes longer than some rounds."""
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None
    with _no_garbage_collection(), torch.cuda.stream(stream):
        # What other threads do with the device meanwhile is not our business.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
        try:
            result = function()
        except BaseException as error:
            failure = error
        try:
            graph.capture_end()
        except RuntimeError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return graph, result


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """An old graph that is found to be garbage during a recording, and deleted, would end it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


__all__ = ["RecordedStep", "Recorder"]
