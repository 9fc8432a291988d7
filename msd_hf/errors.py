"""The errors raised by `msd_hf`: all are `ValueError`s, so that code written for `generate` catches them as it is."""

from collections.abc import Iterator
from contextlib import contextmanager


class MSDError(ValueError):
    """Base of every error that this package raises on purpose."""


class MSDCheckpointError(MSDError):
    """A draft checkpoint lacks a weight, has one too many, or one of the wrong shape."""


class MSDPairingError(MSDError):
    """The draft does not fit the target it was given to: other hidden size, or another kind of decoder."""


class MSDUnsupportedError(MSDError):
    """An argument of `generate`, or a kind of target, that cannot be combined with an MSD draft (yet)."""


class MSDDataError(MSDError):
    """
    A training sample that cannot be used.

    Args:
        reason (`str`): short and fixed, so that samples can be counted by it.
        detail (`str`): what is wrong with this one.
        sample_id (`str`, *optional*): its `id`.
    """

    def __init__(self, reason: str, detail: str, sample_id: str | None = None):
        super().__init__(detail if sample_id is None else f"Sample {sample_id!r}: {detail}")
        self.reason, self.detail, self.sample_id = reason, detail, sample_id

    def __reduce__(self):  # as data loader workers send it
        return type(self), (self.reason, self.detail, self.sample_id)


@contextmanager
def errors_name_sample(sample_id: str) -> Iterator[None]:
    """Inside the block every [`MSDDataError`] gets the id of the sample that is being read."""
    try:
        yield
    except MSDDataError as error:
        raise MSDDataError(error.reason, error.detail, sample_id) from error.__cause__


__all__ = [
    "MSDCheckpointError",
    "MSDDataError",
    "MSDError",
    "MSDPairingError",
    "MSDUnsupportedError",
    "errors_name_sample",
]
