"""Waiting for a GPU before the clock is read."""

from __future__ import annotations

import torch


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all work that was queued; does nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["synchronize"]
