"""A JSONL file that is written over hours, line by line beside its final name, so that a killed run can resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import MSDError
from ...writing.destination import check_parent
from ...writing.saving import remove_temporary_files, replaced_file


class Journal:
    """
    Holds one line for each sample of a data set, in order. The lines are in `OUTPUT.partial`, after a line with the
    settings of the run, until [`~Journal.finish`] writes OUTPUT.

    Args:
        output: the final file.
        settings: the settings on which the lines depend. A value that JSON cannot hold is compared by its type.
        part (*optional*): the number of a process, whose lines are in `OUTPUT.partial-PART`, in any order.

    Raises:
        MSDError: when `output` exists, or was begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any], part: int | None = None):
        check_unwritten(output)
        self.output, self.path = output, partial_path(output, part)
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(output)
        settings = json.loads(json.dumps(settings, default=lambda value: type(value).__name__))
        self.num_done = 0
        self._file: BinaryIO = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
        try:
            self._resume(settings)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, settings: dict[str, Any]) -> None:
        header = self._file.readline()
        if not header.endswith(b"\n"):
            self._file.seek(0)
            self._file.truncate()
            self._write(settings)
            return
        self._check(header, settings)
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):  # the run was killed while it wrote this line
                break
            end += len(line)
            self.num_done += 1
        self._file.seek(end)
        self._file.truncate()

    def _check(self, header: bytes, settings: dict[str, Any]) -> None:
        try:
            old = json.loads(header)
        except ValueError as error:
            raise MSDError(f"{str(self.path)!r} is damaged: remove it to start over.") from error
        names = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
        if names:
            changes = ", ".join(
                f"{name} ({_shorten(old.get(name))} -> {_shorten(settings.get(name))})" for name in names
            )
            raise MSDError(
                f"{str(self.path)!r} was begun with other settings: {changes}. Give the same settings to resume, or "
                "remove the file to start over."
            )

    def append(self, record: dict[str, Any]) -> None:
        """Adds the line of the next sample, which is kept even if the run is killed afterwards."""
        self._write(record)
        self.num_done += 1

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(_to_json(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise MSDError(
                f"{str(self.path)!r} could not be written: {error.strerror}. {self.num_done:,} samples are kept: the "
                "same call goes on there."
            ) from error

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines so far, without the settings."""
        return (record for _, record in self.placed_records())

    def placed_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines so far, each with its place in the file, in bytes."""
        with open(self.path, "rb") as file:
            place = len(next(file))
            for line in file:
                yield place, json.loads(line)
                place += len(line)

    def finish(self, key: str) -> None:
        """Writes the value under `key` of each line that has it to the final file, and removes the journal."""
        self.close()
        try:
            with replaced_file(self.output) as temporary, open(temporary, "w", encoding="utf-8") as file:
                for record in self.records():
                    if key in record:
                        file.write(_to_json(record[key]) + "\n")
        except OSError as error:
            raise MSDError(
                f"{str(self.output)!r} could not be written: {error.strerror}. All samples are kept in "
                f"{str(self.path)!r}: the same call finishes the file."
            ) from error
        self.path.unlink()

    def discard(self) -> None:
        """Removes the journal. There is no final file."""
        self.close()
        self.path.unlink()

    def close(self) -> None:
        """Closes the file. The lines are kept."""
        with suppress(OSError):  # a line that the disk could not hold has raised its error already
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def check_unwritten(output: Path) -> None:
    """
    Checks that no complete `output` exists, which a new run would overwrite.

    Raises:
        MSDError: when `output` exists and is complete, or cannot be written.
    """
    check_parent(output)
    if output.is_symlink() or output.is_dir():
        raise MSDError(f"{str(output)!r} is a {'link' if output.is_symlink() else 'folder'}: choose another name.")
    if is_written(output):
        raise MSDError(f"{str(output)!r} exists: remove it, or choose another name.")


def is_written(output: Path) -> bool:
    """Whether a complete `output` exists."""
    # `output` and its journal both exist if the run was killed between the last two steps of `finish`.
    return output.exists() and not partial_path(output).exists()


def _to_json(record: Any) -> str:
    """A record as one line. Halves of surrogate pairs, as in a file name that is not UTF-8, are escaped."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def partial_path(output: Path, part: int | None = None) -> Path:
    """The file of the lines so far: of all of them, or of a process."""
    return output.with_name(f"{output.name}.partial{'' if part is None else f'-{part}'}")


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + "..."


__all__ = ["Journal", "check_unwritten", "is_written", "partial_path"]
