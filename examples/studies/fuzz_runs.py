"""
Runs one case of a fuzz study in a forked child, which has a time limit and whose memory is watched.

A fork of a process that has imported everything starts at once, where a new interpreter takes seconds. Needs Linux.
"""

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


SECONDS = 20.0  # a case that takes longer hangs
GIGABYTE = 10**9
HARD_LIMIT = 4 * GIGABYTE  # above the memory at the fork: a case cannot take the whole machine
_ALLOCATION_ERRORS = ("MemoryError", "allocate memory", "not enough memory", "Cannot allocate")


@dataclass(frozen=True)
class Outcome:
    """
    How a case ended.

    Args:
        status (`int`, *optional*): exit status; negative for a signal; `None` if the time limit ended the case.
        output, errors (`str`): what it wrote.
        seconds (`float`): how long it took.
        num_bytes (`int`): address space that it took at most, above that at the fork. Pages that were reserved and
            never touched count too.
    """

    status: int | None
    output: str
    errors: str
    seconds: float
    num_bytes: int

    def problems(self) -> list[str]:
        """What no case may do, whatever its input: write a traceback, hang, be killed, or take a gigabyte."""
        found = []
        text = self.output + self.errors
        if self.status is None:
            found.append(f"hangs for {SECONDS:.0f} s")
        elif self.status < 0:
            found.append(f"ends by signal {-self.status}")
        if "Traceback (most recent call last)" in text:
            found.append("traceback")
        if self.num_bytes > GIGABYTE:
            found.append(f"takes {self.num_bytes / GIGABYTE:.1f} GB")
        if any(error in text for error in _ALLOCATION_ERRORS):
            found.append("asks for too much memory")
        return found


def run_forked(case: Callable[[], int | None], seconds: float = SECONDS) -> Outcome:
    """
    Runs `case` in a forked child. What it returns, or the code of its `SystemExit`, is the exit status.

    A case that hangs is run again: one fork in some hundred hangs by itself, because a thread of this process held a
    lock at that moment. `case` must not depend on what its first run has left.
    """
    outcome = _run_once(case, seconds)
    return _run_once(case, seconds) if outcome.status is None else outcome


def _run_once(case: Callable[[], int | None], seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        output, errors, peak = (Path(folder, name) for name in ("output", "errors", "peak"))
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        before = _memory(os.getpid(), "VmSize")
        child = os.fork()
        if child == 0:
            _run_child(case, output, errors, peak, before, seconds)
        status, watched = _wait(child, start + seconds)
        taken = int(peak.read_text()) if peak.exists() else watched
        return Outcome(
            status,
            output.read_text(errors="replace"),
            errors.read_text(errors="replace"),
            time.monotonic() - start,
            max(taken, watched) - before,
        )


def _run_child(
    case: Callable[[], int | None], output: Path, errors: Path, peak: Path, before: int, seconds: float
) -> None:
    status = 70
    try:
        os.setsid()  # so that its own children end with it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for path, stream in ((output, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        faulthandler.dump_traceback_later(0.9 * seconds, file=sys.stderr)  # says where a case hangs
        resource.setrlimit(resource.RLIMIT_AS, (before + HARD_LIMIT, before + HARD_LIMIT))
        try:
            status = case() or 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        peak.write_text(str(_memory(os.getpid(), "VmPeak")))
    finally:
        os._exit(status & 0xFF)


def _wait(child: int, deadline: float) -> tuple[int | None, int]:
    """Waits for the end of a child, and ends its whole group. Returns its status and the most memory that was seen."""
    seen = 0
    while True:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            status: int | None = os.waitstatus_to_exitcode(code)
            break
        seen = max(seen, _memory(child, "VmPeak"))
        if time.monotonic() > deadline:
            status = None
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status, seen


def _memory(pid: int, field: str) -> int:
    """A field of /proc/PID/status, in bytes; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
