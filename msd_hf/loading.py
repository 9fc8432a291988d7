"""Loading a target from names as a user types them: its folder or Hub id, a dtype and a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel

from .errors import MSDError, describe_error, is_about_input
from .limits import DTYPE_NAMES


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights that can compute


def load_config(name: str | Path) -> PreTrainedConfig:
    """
    Loads the config of a target from a folder or the Hub. Code from there is never run.

    Raises:
        MSDError: when it cannot be loaded.
    """
    with _errors_name("config", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_processor(name: str | Path) -> Any:
    """
    Loads the processor of a target from a folder or the Hub. Code from there is never run.

    Raises:
        MSDError: when it cannot be loaded, or a package that it needs is missing.
    """
    with _errors_name("processor", name):
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)


def load_target(
    name: str | Path,
    dtype: str = "auto",
    device: str | None = None,
    dtype_option: str = "--dtype",
    **arguments: Any,
) -> PreTrainedModel:
    """
    Loads a target from a folder or the Hub.

    Args:
        name: folder or Hub id of the target.
        dtype: name of a dtype for [`parse_dtype`].
        device: name of a device for [`parse_device`]. `None` leaves the target where `from_pretrained` puts it.
        dtype_option: the option that an error about `dtype` names.
        arguments: further arguments of `from_pretrained`; those that are `None` are left out.

    Raises:
        MSDError: when the dtype or the device cannot be used, or the target cannot be loaded.
    """
    # Dtype and device are checked first, because loading the weights takes long.
    resolved_dtype = parse_dtype(dtype, dtype_option)
    resolved_device = None if device is None else parse_device(device)
    given = {key: value for key, value in arguments.items() if value is not None}
    with _errors_name("weights", name):
        target = AutoModelForImageTextToText.from_pretrained(
            name, dtype=resolved_dtype, trust_remote_code=False, **given
        )
    return target if resolved_device is None else target.to(resolved_device)


def outline_target(name: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """A target without its weights (on the device "meta"), for questions that its configuration answers."""
    resolved = parse_dtype(dtype)
    config = load_config(name)
    with _errors_name("model", name), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype if resolved == "auto" else resolved)


def load_target_and_processor(
    name: str | Path, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Loads a target, as [`load_target`] does, and its processor."""
    # The processor is loaded first: if it is missing, the user need not wait for the weights to learn that.
    parse_dtype(dtype)
    processor = load_processor(name)
    return load_target(name, dtype, device), processor


def parse_dtype(name: str, option: str = "--dtype") -> torch.dtype | str:
    """
    Returns the floating-point dtype called `name`. "auto" is returned as it is: `from_pretrained` understands it.

    Raises:
        MSDError: when there is no such dtype. The message names `option`.
    """
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if dtype not in _DTYPES:
        raise MSDError(f"{option} {name!r} is not known: use {DTYPE_NAMES}.")
    return dtype


def parse_device(name: str) -> torch.device:
    """
    Returns the device called `name`. "auto" is a GPU if there is one, else the CPU.

    Raises:
        MSDError: when this machine does not have the device, or the device computes nothing (`meta`).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds, a missing package among them
        raise MSDError(f"--device {name!r} cannot be used on this machine.") from error
    return device


@contextmanager
def _errors_name(part: str, name: str | Path) -> Iterator[None]:
    """Inside the block every error, whatever a library raises for a broken file, says which target has it."""
    try:
        yield
    except MSDError:
        raise
    except Exception as error:
        if not is_about_input(error) and not isinstance(error, ImportError):
            raise
        raise MSDError(f"The {part} of the target {str(name)!r} cannot be loaded: {describe_error(error)}") from error


__all__ = [
    "load_config",
    "load_processor",
    "load_target",
    "load_target_and_processor",
    "outline_target",
    "parse_device",
    "parse_dtype",
]
