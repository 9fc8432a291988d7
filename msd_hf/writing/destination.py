"""Folders that a command writes: whether one may be replaced, and how it is replaced as a whole."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MSDError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_SHOWN_NAMES = 3  # names of foreign files in an error
# The folders of a workspace: half-written; written, or just exchanged with the old one; the old one, moved aside.
_NEW, _READY, _OLD = "new", "ready", "old"
# Errors of `renameat2` on systems that cannot exchange two folders.
_NO_EXCHANGE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))


@dataclass(frozen=True)
class FolderKind:
    """
    A kind of folder that we write, and may replace.

    Args:
        name: the kind in an error message, such as "an MSD draft".
        owns: whether a file, by its path, is one that we write into such a folder.
        recognises: whether a folder, by its path, is of this kind.
    """

    name: str
    owns: Callable[[Path], bool]
    recognises: Callable[[Path], bool]

    def foreign(self, folder: Path) -> list[str]:
        """The names in `folder` that are not ours: links, folders, and files that we do not write there."""
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.is_file(follow_symlinks=False) or not self.owns(Path(entry.path))
            )


def check_destination(folder: str | Path, kind: FolderKind, overwrite: bool = False) -> Path:
    """
    Checks that `folder` can be written, and that nothing else is lost if it is replaced. Clears what a killed run left
    beside it. Call it before any long work; [`replaced_folder`] checks again.

    Returns:
        The absolute path, without links.

    Raises:
        MSDError: when the folder exists and `overwrite` is false, when it is not of this kind or holds anything else,
            or when it is no folder that may be replaced: the working directory, a home directory, a mount point, a
            link, a file.
    """
    given = Path(folder).expanduser()
    with _one_sentence(given):
        if given.is_symlink():
            raise MSDError(f"{str(folder)!r} is a symbolic link: give the name of a folder.")
        resolved = given.resolve()
        clear_leftovers(resolved, kind)
        if not resolved.exists():
            check_parent(resolved)
        elif not resolved.is_dir():
            raise MSDError(f"{str(folder)!r} is a file: choose the name of a folder.")
        elif not overwrite:
            raise MSDError(f"{str(folder)!r} exists: choose another name, or add --overwrite.")
        else:
            _check_replaceable(resolved, kind)
    return resolved


def check_parent(path: Path) -> None:
    """
    Checks that a new file or folder can be made at `path`, whose parents may be missing too.

    Raises:
        MSDError: when a parent is no folder, or cannot be written.
    """
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise MSDError(f"{str(path)!r} cannot be written: {str(parent)!r} is not a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MSDError(f"{str(path)!r} cannot be written: {str(parent)!r} is read-only for this user.")


def _check_replaceable(folder: Path, kind: FolderKind) -> None:
    refused = f"{str(folder)!r} is not replaced: "
    for place, name in ((Path.cwd(), "the working directory"), (_home(), "the home directory")):
        if folder in (place, *place.parents):
            raise MSDError(f"{refused}it is {name}, or holds it. Choose another name.")
    if os.path.ismount(folder):
        raise MSDError(f"{refused}it is a mount point. Choose a folder in it.")
    foreign = kind.foreign(folder)
    if foreign:
        names = ", ".join(map(repr, foreign[:_SHOWN_NAMES]))
        more = f" and {len(foreign) - _SHOWN_NAMES} more" if len(foreign) > _SHOWN_NAMES else ""
        raise MSDError(f"{refused}it holds {names}{more}, not only {kind.name}. Choose another name.")
    if any(folder.iterdir()) and not kind.recognises(folder):
        raise MSDError(f"{refused}it does not hold {kind.name}. Choose another name.")
    check_parent(folder)


def _home() -> Path:
    try:
        return Path.home().resolve()
    except RuntimeError:  # a user without a home directory
        return Path.cwd()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json` in a folder; empty if there is none, or if it is no JSON object."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError in older releases of Python
        raise MSDError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


# ---- replacing ----


@contextmanager
def replaced_folder(folder: str | Path, kind: FolderKind, overwrite: bool = False) -> Iterator[Path]:
    """
    A new folder that takes the name `folder` when the block ends without an error.

    An older folder keeps the name until then, and is removed last. A process that is killed leaves the old or the new
    folder under the name. (If the system cannot exchange two folders, the old one may stand beside it; the next run
    puts it back.) If two processes write to one name, each folder is complete.

    Raises:
        MSDError: as [`check_destination`] does, before and after the block.
    """
    folder = check_destination(folder, kind, overwrite)
    with _one_sentence(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace, lock = _make_workspace(folder)
    try:
        new = workspace / _NEW
        os.mkdir(new)
        yield new
        with _one_sentence(folder):
            _make_durable(new)
            check_destination(folder, kind, overwrite)
            os.rename(new, workspace / _READY)
            _put_in_place(workspace, folder, kind)
    finally:
        _clear(workspace, folder, kind)
        if lock is not None:
            os.close(lock)


def _put_in_place(workspace: Path, folder: Path, kind: FolderKind) -> None:
    ready, old = workspace / _READY, workspace / _OLD
    if not folder.exists():
        _take_name(ready, folder)
        return
    is_exchanged = _exchange(ready, folder)
    if not is_exchanged:
        os.rename(folder, old)
        _take_name(ready, folder)
    # No process can write into the old folder by its name any more.
    foreign = kind.foreign(ready if is_exchanged else old)
    if foreign:
        if is_exchanged:
            _exchange(ready, folder)
        else:
            os.rename(folder, ready)
            os.rename(old, folder)
        raise MSDError(f"{str(folder)!r} is not replaced: {foreign[0]!r} was written to it meanwhile.")


def _take_name(ready: Path, folder: Path) -> None:
    try:
        os.rename(ready, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise MSDError(f"{str(folder)!r} was written by another process meanwhile, and is not replaced.") from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step of the file system; false if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(working_directory, os.fsencode(one), working_directory, os.fsencode(other), exchange) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NO_EXCHANGE:
        return False
    raise OSError(error, os.strerror(error), str(other))


def _make_durable(folder: Path) -> None:
    # The old folder is removed only after the new one is on the disk.
    for path in filter(Path.is_file, folder.rglob("*")):
        os.chmod(path, 0o644)  # safetensors makes files that only their owner can read
        with open(path, "rb") as file:
            os.fsync(file.fileno())


# ---- the workspace ----


def _make_workspace(folder: Path) -> tuple[Path, int | None]:
    """
    Makes a folder beside `folder` that is locked while this process lives, so that another process knows whether it is
    left over. Returns its path, and the open file of the lock, if the system has locks.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".tmp", dir=folder.parent))
        if fcntl is None:
            return path, None
        with suppress(FileNotFoundError):  # another process removed it before it was locked
            lock = os.open(path, os.O_RDONLY)
            if _lock(lock) and path.exists():
                return path, lock
            os.close(lock)


def _lock(file: int) -> bool:
    """Locks an open file; false if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks; `clear_leftovers` removes nothing there
    return True


def clear_leftovers(folder: Path, kind: FolderKind) -> None:
    """
    Removes the workspaces of killed processes that wrote `folder`. An old folder that was moved aside, and not yet
    replaced, gets its name back. The workspaces of living processes stay.
    """
    if fcntl is None or not folder.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}\.tmp")
    with suppress(PermissionError), os.scandir(folder.parent) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
        for path in found:
            with suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if set(os.listdir(path)) <= {_NEW, _READY, _OLD}:
                        _clear(path, folder, kind)
                finally:
                    os.close(lock)


def _clear(workspace: Path, folder: Path, kind: FolderKind) -> None:
    old = workspace / _OLD
    with suppress(OSError):
        if old.is_dir() and not os.path.lexists(folder):
            os.rename(old, folder)
    shutil.rmtree(workspace / _NEW, ignore_errors=True)
    for path in (workspace / _READY, old):  # either may be the old folder: nothing goes that is not ours
        with suppress(OSError):
            if path.is_dir() and not kind.foreign(path):
                for file in path.iterdir():
                    os.unlink(file)
                os.rmdir(path)
    with suppress(OSError):
        os.rmdir(workspace)


__all__ = ["FolderKind", "check_destination", "check_parent", "clear_leftovers", "read_config", "replaced_folder"]
