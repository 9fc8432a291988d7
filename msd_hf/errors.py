"""The errors of `msd_hf`. All are `ValueError`s, so that code written for `generate` catches them unchanged."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


# Errors of the operating system that say nothing about the file that was being read.
_ERRORS_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EPIPE", "EROFS", "ESTALE")
    if hasattr(errno, name)
}
# torch's errors for memory and for a broken GPU, by name, so that this module need not import torch.
_KINDS_OF_THE_MACHINE = ("OutOfMemoryError", "AcceleratorError")
# It raises plain `RuntimeError`s for memory on a CPU and, before 2.8, for a broken GPU.
_TEXTS_OF_THE_MACHINE = ("DefaultCPUAllocator", "allocate memory", "not enough memory", "CUDA error")
# Packages that are imported by another name than they are installed by.
_PACKAGES = {"PIL": "pillow", "cv2": "opencv-python", "skimage": "scikit-image", "sklearn": "scikit-learn"}
# An error from a worker of a `DataLoader` holds its traceback; the last line that is not indented is the error.
_FROM_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback .*\n[\w.]+: ((?!.*\n[\w.]+: ).+)", re.DOTALL
)


class MSDError(ValueError):
    """Base class of all errors that this package raises on purpose."""


class MSDUsageError(MSDError):
    """A command line that cannot be read: an unknown argument, or a value of the wrong kind."""


class MSDCheckpointError(MSDError):
    """A checkpoint is no draft, or it lacks a weight, has an unknown weight, or has a weight of the wrong shape."""


class MSDPairingError(MSDError):
    """The draft does not fit the target, for example because it has another hidden size or reads a missing layer."""


class MSDUnsupportedError(MSDError):
    """An argument of `generate`, a setting of the draft or a kind of target that MSD drafts do not support (yet)."""


class MSDCacheError(MSDError, RuntimeError):
    """A KV cache is to be cropped back to slots that it has lost. Releases of transformers raise a `ValueError` or a
    `RuntimeError` for this; this error is both."""


class MSDProcessError(MSDError):
    """Another process of a job that several processes share has ended, so that this one cannot go on."""


class MSDDataError(MSDError):
    """
    A training sample that cannot be used.

    Args:
        reason: a short, fixed text, by which samples are counted.
        detail: what is wrong with this sample.
        sample_id: `id` of the sample; `None` if it is not known.
    """

    def __init__(self, reason: str, detail: str | None = None, sample_id: str | None = None):
        # A `DataLoader` makes the error of a worker again from one text.
        detail = reason if detail is None else detail
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
def errors_name_sample(sample_id: str | None, reason: str = "unexpected error") -> Iterator[None]:
    """
    Inside the block every error of the sample that is being read is an [`MSDDataError`] with the id of the sample, so
    that the loop over the samples can count it and go on.

    Errors that are not the sample's pass unchanged: other [`MSDError`]s, which are about the processor or the whole
    data, a missing package, and errors of the machine ([`is_about_input`]).

    Args:
        sample_id: id of the sample; `None` if a block around this one knows it.
        reason: the reason of errors that are no [`MSDDataError`]s yet.
    """
    try:
        yield
    except MSDDataError as error:
        if sample_id is None:
            raise
        raise MSDDataError(error.reason, error.detail, sample_id) from error.__cause__
    except Exception as error:
        if isinstance(error, MSDError) or not is_about_input(error):
            raise
        raise MSDDataError(reason, f"{reason}: {type(error).__name__}: {error}", sample_id) from error


def is_about_input(error: BaseException) -> bool:
    """Whether an error that was raised while something was read can come from its content. Missing memory, a full
    disk, too many open files, a missing package or an interrupt cannot."""
    if isinstance(error, OSError):
        return error.errno not in _ERRORS_OF_THE_MACHINE
    if isinstance(error, (MemoryError, ImportError)) or not isinstance(error, Exception):
        return False
    is_plain = isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS_OF_THE_MACHINE)
    return not is_plain and not any(kind.__name__ in _KINDS_OF_THE_MACHINE for kind in type(error).__mro__)


@contextmanager
def errors_end_script() -> Iterator[None]:
    """Inside the block of a script each error of this package ends it with one line and exit status 1."""
    try:
        yield
    except MSDError as error:
        sys.exit(f"Error: {error}")


def describe_error(error: BaseException) -> str:
    """What an error of a library says, for a user: with its kind, unless its text is written for users, and with the
    command that installs a missing package."""
    text = str(error).strip()
    if isinstance(error, ModuleNotFoundError) and error.name:
        # transformers puts a sentence in the place of the name: The 'safetensors>=0.4.3' distribution was not found.
        package = re.sub(r"^The '([\w-]+).*", r"\1", error.name.partition(".")[0])
        return f"the package {package!r} is missing: pip install {_PACKAGES.get(package, package)}"
    if isinstance(error, (OSError, ImportError, MSDError)) and text:
        worker = _FROM_WORKER.match(text)
        return worker[1].strip() if worker else text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


__all__ = [
    "MSDCacheError",
    "MSDCheckpointError",
    "MSDDataError",
    "MSDError",
    "MSDPairingError",
    "MSDProcessError",
    "MSDUnsupportedError",
    "MSDUsageError",
    "describe_error",
    "errors_end_script",
    "errors_name_sample",
    "is_about_input",
    "shown",
]
