"""A streamed data set: samples that are read in order, and again from the beginning after the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from ...errors import MSDError, describe_error
from .conversation import Conversation
from .reading import SampleReader


NUM_PROBES = 16  # samples whose content identifies a stream


class StreamedConversations:
    """
    [`Conversation`]s of a stream, such as a `datasets.IterableDataset`. They are numbered over all passes; the numbers
    that are asked for should rise, because a step back reads the stream from its beginning.

    Args:
        samples (`Iterable`): raw samples; each `iter` begins anew. `set_epoch(pass)` is called before each pass, if
            there is such a method, so that a shuffled stream has another order in each.
        name: name of the data in messages.
        reader: reads a raw sample.
        identify: the content of raw samples as a text, for the fingerprint.
    """

    image_folder = None

    def __init__(
        self, samples: Iterable[Any], name: str, reader: SampleReader, identify: Callable[[Iterable[Any]], str]
    ):
        self.name, self.reader = name, reader
        self._samples, self._identify = samples, identify
        self._pass, self._num_in_pass = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._num_read = 0  # over all passes
        self._ahead: deque[Any] = deque()  # the last samples that were read, for a place that is asked for again

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the first samples, in the order of the first pass."""
        self._set_epoch(0)
        return self._identify(islice(self._samples, NUM_PROBES))

    def __len__(self) -> int:
        """
        Refuses.

        Raises:
            MSDError: a stream has no length.
        """
        raise MSDError(
            f"{self.name} is streamed and has no length, which is needed here: give a data set that has one, for "
            "example `datasets.Dataset.from_list(list(stream.take(1000)))`. Only the training data of `MSDTrainer` "
            "may be streamed."
        )

    def __getitem__(self, place: int) -> Conversation:
        """
        Reads on up to a place.

        Args:
            place: number of a sample, counted over all passes.

        Raises:
            MSDDataError: when the sample is broken; its `reason` is one of `REASONS`.
            MSDError: when the stream breaks off, or holds no samples.
        """
        if place < self._num_read - len(self._ahead):
            self._restart()
        while self._num_read <= place:
            self._ahead.append(self._next())
            self._num_read += 1
        first = self._num_read - len(self._ahead)
        return self.reader(self._ahead[place - first], place)

    def begin_at(self, place: int) -> None:
        """Reads on up to a place, and forgets the samples before it."""
        while self._num_read < place:
            self._next()
            self._num_read += 1
            self._ahead.clear()
        while self._ahead and self._num_read - len(self._ahead) < place:
            self._ahead.popleft()

    def _restart(self) -> None:
        self._iterator, self._pass, self._num_read = None, 0, 0
        self._ahead.clear()

    def _next(self) -> Any:
        while True:
            if self._iterator is None:
                self._set_epoch(self._pass)
                self._iterator, self._num_in_pass = iter(self._samples), 0
            try:
                sample = next(self._iterator)
            except StopIteration:
                if self._num_in_pass == 0:
                    raise MSDError(f"{self.name} holds no samples.") from None
                self._iterator, self._pass = None, self._pass + 1
                continue
            except Exception as error:
                raise MSDError(
                    f"{self.name} broke off after {self._num_in_pass:,} samples: {describe_error(error)}. Training "
                    "goes on from its last checkpoint with `resume_from_checkpoint=True`."
                ) from error
            self._num_in_pass += 1
            return sample

    def _set_epoch(self, number: int) -> None:
        set_epoch = getattr(self._samples, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)


__all__ = ["StreamedConversations"]
