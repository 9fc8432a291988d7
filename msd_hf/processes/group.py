"""The processes that share a job: which of them this one is, what its share is, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from ..errors import MSDError, MSDProcessError
from .watch import Watch


_T = TypeVar("_T")
# A process waits while another one works on its share. One that dies is noticed at once, so no limit is needed.
_WAIT = timedelta(days=30)

GO_ON = "Start the same command again on all machines: it goes on with what is kept."


class Processes:
    """
    The processes of a job. All of them make the same calls in the same order. This class is a process that is alone;
    [`launched`] gives the processes that `accelerate launch` or `torchrun` has started.

    Args:
        index: number of this process, from 0. Process 0 alone prints, and writes the files that all share.
        number: number of processes, on all machines together.
    """

    def __init__(self, index: int = 0, number: int = 1):
        self.index, self.number = index, number

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no other processes."""
        return self.number == 1

    def share(self, items: Sequence[_T]) -> Sequence[_T]:
        """The part of `items` that is for this process: every `number`-th one."""
        return items[self.index :: self.number]

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by their index. A value must be picklable."""
        return [value]

    def from_first(self, function: Callable[[], _T]) -> _T:
        """
        Calls a function in process 0, and gives all processes its result, which must be picklable.

        Raises:
            MSDProcessError: in the other processes, when the function has raised an error in process 0.
        """
        return function()

    def check_equal(self, terms: Mapping[str, Any]) -> None:
        """
        Checks that all processes have the same `terms`, by name. The files of two machines may differ.

        Raises:
            MSDError: in all processes, when they differ; the message names the terms.
        """
        everywhere = self.gather(dict(terms))
        for index, other in enumerate(everywhere):
            names = [name for name in terms if other.get(name) != everywhere[0].get(name)]
            if names:
                raise MSDError(
                    f"Process {index} has another {' and another '.join(names)} than process 0: all processes need "
                    "the same arguments and the same files."
                )

    def device(self, name: str) -> str:
        """The device for `--device NAME`: of several processes on a machine each takes its own GPU."""
        if self.is_alone or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"

    @contextmanager
    def together(self, advice: str = GO_ON) -> Iterator[None]:
        """
        Inside the block a process that ends, for whatever reason, ends the others too.

        Args:
            advice: what the error says about going on.

        Raises:
            MSDProcessError: when another process has ended inside the block.
        """
        yield


class LaunchedProcesses(Processes):
    """The processes of a group of `torch.distributed`. They talk over gloo, on GPUs too."""

    def __init__(self) -> None:
        super().__init__(distributed.get_rank(), distributed.get_world_size())
        self._group = distributed.new_group(backend="gloo", timeout=_WAIT)
        self._watch_group = distributed.new_group(backend="gloo", timeout=_WAIT)

    def gather(self, value: _T) -> list[_T]:
        values: list[Any] = [None] * self.number
        with _lost_process():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, function: Callable[[], _T]) -> _T:
        answer: list[Any] = [None]
        error = None
        if self.is_first:
            try:
                answer = [(function(),)]
            except BaseException as raised:
                error = raised
        with _lost_process():
            distributed.broadcast_object_list(answer, src=0, group=self._group)
        if error is not None:
            raise error
        if answer[0] is None:
            raise MSDProcessError(f"Process {self.index} ends, because process 0 has failed; its own line says why.")
        return answer[0][0]

    @contextmanager
    def together(self, advice: str = GO_ON) -> Iterator[None]:
        with Watch(self.index, self.number, self._watch_group, advice):
            yield


@contextmanager
def _lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise MSDProcessError("Another process of this job has ended before its part was done.") from error


ALONE = Processes()


def launched() -> Processes:
    """
    The processes that `accelerate launch` or `torchrun` has started for this job, or this process alone. All processes
    must call it, since it connects them.
    """
    if not distributed.is_available():
        return ALONE
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return ALONE
        PartialState(cpu=True, backend="gloo")
    return LaunchedProcesses() if distributed.is_initialized() and distributed.get_world_size() > 1 else ALONE


__all__ = ["ALONE", "Processes", "launched"]
