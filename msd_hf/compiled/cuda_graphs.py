"""Steps that are the same in every round, recorded as CUDA graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Result = TypeVar("Result")


class RecordingMemory:
    """Keeps the memory of recorded graphs that earlier calls have left, by device."""

    def __init__(self) -> None:
        self._arenas: dict[torch.device, list[_Arena]] = {}
        self._lock = threading.Lock()

    def take(self, device: torch.device) -> _Arena:
        """Returns memory that no recorder uses: memory of an earlier call, or new memory."""
        with self._lock:
            spare = self._arenas.get(device)
            if spare:
                return spare.pop()
        return _Arena(device)

    def leave(self, arena: _Arena) -> None:
        """Keeps the memory for the next recorder."""
        with self._lock:
            self._arenas.setdefault(arena.device, []).append(arena)


class Recorder:
    """
    Records the steps of a round as CUDA graphs. The steps run one after the other, and each may read the results of
    the steps before it, so their graphs share one block of memory. After the first step that cannot be recorded, no
    step is recorded any more: a graph must not read tensors that are made anew in each round.

    Args:
        device (`torch.device`): device that the steps run on.
        memory (`RecordingMemory`): lends the memory of earlier calls.
    """

    def __init__(self, device: torch.device, memory: RecordingMemory):
        self.device = device
        self.is_recording = device.type == "cuda"
        self._memory = memory
        self._arena: _Arena | None = None

    def record(self, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result] | None:
        """Calls a function while the device only notes the work, without doing it. Returns the graph and the result of
        the function, or `None` if the function cannot be recorded."""
        current = torch.cuda.current_stream(self.device)
        try:
            if self._arena is None:
                self._arena = self._memory.take(self.device)
            self._arena.stream.wait_stream(current)
            graph, result = _captured(function, self._arena.stream, self._arena.pool)
        except RuntimeError as error:  # something in the target waits for the device
            self.is_recording = False
            self._arena = None  # its state is unknown
            logger.warning_once(
                f"A round could not be recorded as a CUDA graph, and runs more slowly without: {error}"
            )
            return None
        current.wait_stream(self._arena.stream)
        return graph, result

    def close(self) -> None:
        """Leaves the memory to the next recorder."""
        if self._arena is not None:
            self._memory.leave(self._arena)
            self._arena = None


class RecordedStep(Generic[Result]):
    """
    One step of a round, replayed as a CUDA graph on a GPU. There the first call runs the step's function as it is, so
    that everything is set up; the second call records it, and later calls replay the recording. On other devices every
    call runs the function.

    Args:
        function (`Callable`): a function without arguments that does not wait for the device. Tensors that it reads or
            writes must keep their addresses, or be results of earlier steps of the recorder.
        recorder (`Recorder`): recorder of all steps of the round.

    Attributes:
        result: the function's last result. A replay overwrites the tensors that the recorded function made.
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
        """Drops the recording at once. A function that refers back to this step would otherwise keep the recording
        until the next garbage collection."""
        self._graph = None
        del self._function


class _Arena:
    """A stream to record on, and the memory of the graphs. The arena's own small graph keeps the memory when all other
    graphs are gone; otherwise it would neither be used again nor be given back before the device runs out."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._graph, self._kept = _captured(lambda: torch.zeros(1, device=device), self.stream, None)
        self.pool = self._graph.pool()


def _captured(
    function: Callable[[], Result], stream: torch.cuda.Stream, pool: object
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Records a function on a stream. `torch.cuda.graph` would collect garbage first, which takes longer than some
    rounds."""
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None
    with _garbage_collection.stopped(), torch.cuda.stream(stream):
        # Other threads may use the device meanwhile.
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


class _GarbageCollection:
    """Counts the recordings that need garbage collection to stand still, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_recordings = 0
        self._was_enabled = False

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops garbage collection inside the block. During a recording it may delete an old graph, which would end
        the recording."""
        with self._lock:
            if not self._num_recordings:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_recordings += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_recordings -= 1
                if not self._num_recordings and self._was_enabled:
                    gc.enable()


_garbage_collection = _GarbageCollection()


__all__ = ["RecordedStep", "Recorder", "RecordingMemory"]
