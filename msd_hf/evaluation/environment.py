"""The environment of a benchmark: command, versions and machine."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..version import __version__
from ..writing.redaction import redact_command


def describe_environment(target: PreTrainedModel, num_processes: int = 1) -> dict[str, Any]:
    """Command, versions, device, threads, dtype and attention implementation, ready for JSON; the number of processes
    if there are several."""
    return {
        "command": _describe_command(),
        "versions": {
            "msd_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": _describe_device(target.device),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({} if num_processes == 1 else {"processes": num_processes}),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": target.config.get_text_config(decoder=True)._attn_implementation,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _describe_command() -> str:
    program = Path(sys.argv[0])
    # With `python -m PACKAGE`, `sys.argv[0]` is the path of `__main__.py`.
    start = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return redact_command([*start, *sys.argv[1:]])


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return f"CPU ({match[1] if match else platform.processor() or 'unknown'})"


__all__ = ["describe_environment"]
