"""Killed jobs end like uninterrupted ones: the short form of `examples/studies/kills.py`."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_killed_jobs_end_like_uninterrupted_ones():
    # In a process of its own: the study forks, and a process of tests has threads.
    command = [sys.executable, ROOT / "examples" / "studies" / "kills.py", "--kills", "8"]
    jobs = [part for name in ("cached", "extract", "regenerate", "convert") for part in ("--only", name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, *jobs], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and ", 0 problems" in result.stdout, result.stdout + result.stderr[-3000:]
