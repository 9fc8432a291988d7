"""Runs tests of this repository against a copy of the package in which one file is changed."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).parents[2]
_PARTS = ("msd_hf", "tests", "examples", "model_cards")
_FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_LIBRARIES = (
    "pytest",
    "torch",
    "transformers.generation",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llama.modeling_llama",
)
_MEMORY = 8 * 2**30  # bytes of addresses: with a fault a test may never end and take all memory


class PackageCopy:
    """
    A copy of the package and its tests in a temporary folder.

    Tests run in forked children. The parent imports torch and transformers once and never imports `msd_hf`, so that a
    run starts without these imports and with the changed file. It needs `os.fork`: Linux or macOS.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for part in _PARTS:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _FILES:
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, folder)

    def source(self, file: str) -> str:
        """The content of a file below `msd_hf`."""
        return (self.folder / "msd_hf" / file).read_text(encoding="utf-8")

    @contextmanager
    def changed(self, file: str, source: str) -> Iterator[None]:
        """A file below `msd_hf` has other content within this context."""
        before = self.source(file)
        path = self.folder / "msd_hf" / file
        path.write_text(source, encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(before, encoding="utf-8")

    def run(self, arguments: list[str], timeout: float = 1800) -> tuple[int | None, str]:
        """
        Runs pytest until the first failure.

        Args:
            arguments: arguments of pytest, such as files of tests.
            timeout: seconds after which the run and its children are ended.

        Returns:
            The exit status of pytest (0: all passed, 1: a test failed), `None` after a timeout, and what was printed.
            A run that a signal ended, as after a crash, has the negative number of the signal.
        """
        with tempfile.NamedTemporaryFile(suffix=".txt") as output:
            child = os.fork()
            if child == 0:
                self._run_in_child(arguments, output.fileno())
            status = _wait(child, timeout)
            with open(output.name, encoding="utf-8", errors="replace") as file:
                return status, file.read()

    def _run_in_child(self, arguments: list[str], output: int) -> None:
        status = 3
        try:
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # two changes of one size within a second look alike
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self.folder))
            import pytest

            status = int(pytest.main(["-q", "-x", "--tb=short", "-p", "no:cacheprovider", *arguments]))
            package = sys.modules.get("msd_hf")
            if package is not None and not Path(package.__file__).is_relative_to(self.folder):
                status = 3
                print(f"The tests ran {package.__file__}, which is not the copy.")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


@contextmanager
def package_copy() -> Iterator[PackageCopy]:
    """A [`PackageCopy`] that is removed in the end."""
    _import_libraries()
    with tempfile.TemporaryDirectory() as name:
        yield PackageCopy(Path(name).resolve())


def _import_libraries() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads of its parent; the tests set this too
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in _LIBRARIES:
        importlib.import_module(name)
    if "msd_hf" in sys.modules:
        raise RuntimeError("msd_hf is imported already: the children would not import the copy.")


def _wait(child: int, timeout: float) -> int | None:
    """The exit status of a child; `None` if it had to be ended."""
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None
    finally:
        if child:  # too long, or an interrupt
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
