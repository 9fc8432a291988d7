"""Peak memory of a block of code."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class PeakMemory:
    """
    Measures the peak memory inside a `with` block. On a GPU this is the peak of the allocator, elsewhere the peak of
    the process, which can be measured only where the system can reset it (Linux).

    Args:
        device: device of the models.

    Attributes:
        num_bytes (`int`, *optional*): the peak, weights included; `None` if it cannot be measured.
    """

    _STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device):
        self.device = device
        self.num_bytes: int | None = None
        self._can_reset = False

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                self._RESET.write_text("5")
                self._can_reset = True
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._can_reset:
            match = re.search(r"VmHWM:\s+(\d+) kB", self._STATUS.read_text())
            self.num_bytes = None if match is None else int(match[1]) * 1024


__all__ = ["PeakMemory"]
