"""Notices that another process of a job has ended, and ends this one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch
from torch import distributed

from ..errors import MSDProcessError


_TAG = 1
_DONE, _FAILED = 1.0, 0.0
_NETWORK_ERRORS = ("gloo", "NCCL", "Connection")  # words in the `RuntimeError`s of torch.distributed
_VERDICT = 1.0  # seconds in which a process that ends is noticed, though a launcher's signal may come first
_PATIENCE = 10.0  # seconds in which the others notice that this process has failed
_GRACE = 30.0  # seconds after which a process ends that does not react, since it waits for a GPU for example


class Watch:
    """
    Inside the `with` block, a process that ends before its own block does interrupts this process.

    A thread for each other process waits for a message that it sends at the end of its block. The connection breaks if
    the process dies, on another machine too. The thread then sends SIGTERM to this process, which raises `SystemExit`
    inside the block, unless the program has a handler of its own. Without an error the block of a process ends when
    those of all processes end.

    Args:
        index: number of this process.
        number: number of processes.
        group: a group of `torch.distributed` for these messages alone, over gloo.
        advice: the end of the error message: what to do.

    Raises:
        MSDProcessError: at the end of the block, if another process was lost and the block has no error of its own.
    """

    def __init__(self, index: int, number: int, group: Any, advice: str):
        self.index, self.number, self.group, self.advice = index, number, group, advice
        self.lost: int | None = None
        self._is_lost, self._has_ended = threading.Event(), threading.Event()
        self._handler: Any = None
        self._others = [other for other in range(number) if other != index]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watch:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._handler = signal.signal(signal.SIGTERM, _exit)
        self._threads = [threading.Thread(target=self._wait_for, args=(other,), daemon=True) for other in self._others]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        # A lost process shows in many ways: by a signal, or by the error of a message that was to come from it.
        is_suspect = _may_be_of_another(error)
        try:
            if is_suspect:
                self._is_lost.wait(_VERDICT)
            self._has_ended.set()
            self._say(_DONE if kind is None else _FAILED)
            self._join(is_patient=kind is None)
        finally:
            self._has_ended.set()
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)
        if self.lost is not None and (kind is None or is_suspect):
            raise MSDProcessError(self._message()) from error

    def _join(self, is_patient: bool) -> None:
        """Waits for the threads, since one that waits when Python ends would abort this process: until all processes
        have ended their blocks, or after a failure until they have had the time to."""
        deadline = time.monotonic() + _PATIENCE
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.1)
                if is_patient and self.lost is None:
                    deadline = time.monotonic() + _PATIENCE
                elif time.monotonic() > deadline:
                    break

    def _message(self) -> str:
        return (
            f"Process {self.index} of {self.number} ends, because process {self.lost} has ended before its part was "
            f"done; its own last line may say why. {self.advice}"
        )

    def _say(self, outcome: float) -> None:
        for other in self._others:
            with suppress(RuntimeError):  # it has ended; its thread notices
                distributed.send(torch.tensor([outcome]), dst=other, group=self.group, tag=_TAG)

    def _wait_for(self, other: int) -> None:
        outcome = torch.tensor([_FAILED])
        with suppress(RuntimeError):
            message = distributed.irecv(outcome, src=other, group=self.group, tag=_TAG)
            if message is not None:
                message.wait()
        if outcome.item() != _DONE:
            self._note_lost(other)

    def _note_lost(self, other: int) -> None:
        if self._is_lost.is_set():
            return
        self.lost = other
        self._is_lost.set()
        if self._has_ended.is_set():
            return
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._has_ended.wait(_GRACE):
            print(f"Error: {self._message()}", file=sys.stderr, flush=True)
            os._exit(1)


def _may_be_of_another(error: BaseException | None) -> bool:
    """Whether an error may come from the end of another process."""
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in _NETWORK_ERRORS)
    return isinstance(error, (SystemExit, MSDProcessError))


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


__all__ = ["Watch"]
