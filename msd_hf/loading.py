"""Loading a target from names as a user types them: its folder or Hub id, a dtype and a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from .errors import MSDError


DTYPE_NAMES = "auto, float32, bfloat16, float16 or float64"


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
        MSDError: when the dtype or the device cannot be used.
    """
    # Dtype and device are checked first, because loading the weights takes long.
    resolved_dtype = parse_dtype(dtype, dtype_option)
    resolved_device = None if device is None else parse_device(device)
    given = {key: value for key, value in arguments.items() if value is not None}
    target = AutoModelForImageTextToText.from_pretrained(name, dtype=resolved_dtype, **given)
    return target if resolved_device is None else target.to(resolved_device)


def load_target_and_processor(
    name: str | Path, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Loads a target, as [`load_target`] does, and its processor."""
    # The processor is loaded first: if it is missing, the user need not wait for the weights to learn that.
    parse_dtype(dtype)
    processor = AutoProcessor.from_pretrained(name)
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
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise MSDError(f"{option} {name!r} is not known: use {DTYPE_NAMES}.")
    return dtype


def parse_device(name: str) -> torch.device:
    """
    Returns the device called `name`. "auto" is a GPU if there is one, else the CPU.

    Raises:
        MSDError: when this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MSDError(f"--device {name!r} cannot be used on this machine.") from error
    return device


__all__ = ["DTYPE_NAMES", "load_target", "load_target_and_processor", "parse_device", "parse_dtype"]
