"""The errors of `msd_hf`. All are `ValueError`s, so that code written for `generate` catches them unchanged."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MSDError(ValueError):
    """Base class of all errors that this package raises on purpose."""


class MSDCheckpointError(MSDError):
    """A checkpoint is no draft, or it lacks a weight, has an unknown weight, or has a weight of the wrong shape."""


class MSDPairingError(MSDError):
    """The draft does not fit the target, for example because it has another hidden size or reads a missing layer."""


class MSDUnsupportedError(MSDError):
    """An argument of `generate`, a setting of the draft or a kind of target that MSD drafts do not support (yet)."""


class MSDDataError(MSDError):
    """
    A training sample that cannot be used.

    Args:
        reason: a short, fixed text, by which samples are counted.
        detail: what is wrong with this sample.
        sample_id: `id` of the sample; `None` if it is not known.
    """

    def __init__(self, reason: str, detail: str, sample_id: str | None = None):
        super().__init__(detail if sample_id is None else f"Sample {sample_id!r}: {detail}")
        self.reason, self.detail, self.sample_id = reason, detail, sample_id

    def __reduce__(self):  # data loader workers pickle the error
        return type(self), (self.reason, self.detail, self.sample_id)


def shown(value: Any, most: int = 80) -> str:
    """A value in an error message: its `repr`, cut after `most` characters. A number may have thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


@contextmanager
def errors_name_sample(sample_id: str) -> Iterator[None]:
    """Inside the block every [`MSDDataError`] gets the id of the sample that is being read."""
    try:
        yield
    except MSDDataError as error:
        raise MSDDataError(error.reason, error.detail, sample_id) from error.__cause__


@contextmanager
def errors_end_script() -> Iterator[None]:
    """Inside the block of a script each error of this package ends it with one line and exit status 1."""
    try:
        yield
    except MSDError as error:
        sys.exit(f"Error: {error}")


__all__ = [
    "MSDCheckpointError",
    "MSDDataError",
    "MSDError",
    "MSDPairingError",
    "MSDUnsupportedError",
    "errors_end_script",
    "errors_name_sample",
    "shown",
]
