"""Work that is the same each time, as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Result = TypeVar("Result")


class RecordedStep(Generic[Result]):
    """
    A function that takes nothing, reads and writes tensors that stay where they are, and does not wait for the device.
    On a GPU it is called once as it is, for whatever has to be made ready; then it is recorded, and replayed from then
    on. Elsewhere it is called each time.

    Args:
        function (`Callable`): what is done.
        device (`torch.device`): where.
        pool (*optional*): memory that is shared with other steps, which run one after the other.

    Attributes:
        result: what the function gave. Tensors that a recorded function made are overwritten each time.
    """

    result: Result

    def __init__(self, function: Callable[[], Result], device: torch.device, pool: Any = None):
        self._function = function
        self._device = device
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_recordable = device.type == "cuda"
        self._is_ready = False

    def __call__(self) -> Result:
        if self._graph is None and self._is_ready and self._is_recordable:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self.result = self._function()
            self._is_ready = True
        return self.result

    def close(self) -> None:
        """Lets go of what was recorded, which a reference to itself would keep until garbage is collected. A graph
        that is still running ends first."""
        self._graph = None
        del self._function

    def _record(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        try:
            # Not `torch.cuda.graph`, which collects garbage first: that takes longer than some rounds.
            with _no_garbage_collection(), torch.cuda.stream(stream):
                # What other threads do with the device meanwhile is not our business.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self.result = self._function()
                finally:
                    graph.capture_end()
            self._graph = graph
        except RuntimeError as error:  # something in the target waits for the device
            self._is_recordable = False
            logger.warning_once(
                f"A round could not be recorded as a CUDA graph, and runs more slowly without: {error}"
            )
        current.wait_stream(stream)


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


__all__ = ["RecordedStep"]
