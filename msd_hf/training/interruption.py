"""SIGTERM and SIGINT: a run is saved before it ends, and says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import MSDProcessError


logger = logging.get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class HeldSignals:
    """
    Notes the first SIGTERM or SIGINT inside the `with` block instead of ending the process. A second one acts as it
    would without the block.

    Python sets signal handlers in the main thread only: in another thread nothing is held. A signal that the process
    ignores stays ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # `None`: not set by Python
                    self._before[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    def _hold(self, number: int, frame: Any) -> None:
        self._restore()
        if self.signal is None:
            self.signal = signal.Signals(number)
            logger.warning("%s: training ends after this step. A second signal ends it at once.", self.signal.name)
            # Only the handlers that were replaced by this object come back: the next signal acts as usual.

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Does with the signal what would have been done without the block. SIGTERM becomes `SystemExit`."""
        if self.signal is not None:
            deliver(self.signal)


def deliver(number: signal.Signals) -> None:
    """
    Ends this process as a signal would, but by an exception, so that files are closed and processes are joined. A
    handler of the user is called instead.

    Raises:
        KeyboardInterrupt: for SIGINT.
        SystemExit: for SIGTERM, with the exit status of a shell, 143.
    """
    if number == signal.SIGTERM and signal.getsignal(number) == signal.SIG_DFL:
        raise SystemExit(128 + number)
    signal.raise_signal(number)


class StopAtSignal(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came to any of the processes, and stops there."""

    def __init__(self, held: HeldSignals, accelerator: Accelerator):
        self.held, self.accelerator = held, accelerator
        self.requested = self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = self._any_process(self.held.signal is not None)
        if self.requested:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        # Not earlier: the saved state of a run must not say that it has come to its end.
        if self.requested:
            self.stopped = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_evaluate = control.should_save = False

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        # All processes must stop after the same step.
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, reduction="sum"))


def shielded_worker(initialize: Callable[[int], None] | None, worker_id: int) -> None:
    """
    Initializes a worker of a data loader that survives the first SIGTERM or SIGINT. Job schedulers and terminals send
    them to all processes of a run, and the main process needs its workers until the step is finished.
    """
    if initialize is not None:
        initialize(worker_id)
    for number in _SIGNALS:
        signal.signal(number, _survive_once)


def _survive_once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)


@contextmanager
def resumable(describe: Callable[[], str]) -> Iterator[None]:
    """
    Inside the block SIGTERM raises `SystemExit`, so that temporary files are removed, and a warning says after either
    signal how to go on.

    Args:
        describe: gives the text of the warning.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    replaced = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if replaced:
        signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MSDProcessError):
        logger.warning("Interrupted: %s", describe())
        raise
    finally:
        if replaced:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


__all__ = ["HeldSignals", "StopAtSignal", "deliver", "resumable", "shielded_worker"]
