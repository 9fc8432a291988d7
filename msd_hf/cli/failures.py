"""How a command ends: with its result, or with one line about what went wrong and an exit status.

0: done. 1: an error. 2: a command line that cannot be read. 130: interrupted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import typer
from rich.text import Text

from ..errors import MSDError, MSDUsageError, describe_error
from ..terminal import make_console, one_line
from ..writing.redaction import command_secrets, redact_text


INTERRUPTED = 130  # what shells give for a command that Ctrl-C ended
_MOST_CHARACTERS = 1000  # some libraries list all that they know in an error


def exit_status(command: Callable[..., Any]) -> int:
    """
    Runs a command of typer, and prints at most one line if it fails.

    Errors that are made for users are printed as they are: ours, those of a missing file or repository, and those of a
    missing package. For all other errors the line also names a file with the whole traceback.
    """
    try:
        status = _result(command)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # The reader, for example `head`, wants no more. Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except MSDUsageError as error:
        return _fail(str(error), 2)
    except (MSDError, OSError, ImportError) as error:
        return _fail(describe_error(error), 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer's command line; its class is public in no release
            return _fail(_usage(error), 2)
        return _fail(describe_error(error), 1, f" ({_keep_traceback(error)})")


def _result(command: Callable[..., Any]) -> int:
    try:
        # typer would print an error of the command line in several lines.
        status = command(standalone_mode=False)
    except SystemExit as exit_:  # of the help of `msd-hf train`
        status = exit_.code
    if isinstance(status, str):
        raise MSDError(status)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int, note: str = "") -> int:
    line = one_line(message)
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[: _MOST_CHARACTERS - 1]}…"
    console = make_console(stderr=True, soft_wrap=True)
    console.print(Text("Error: ", style="bold red") + Text(line + note))
    return status


def _usage(error: Any) -> str:
    name = getattr(getattr(error, "ctx", None), "command_path", "msd-hf")
    message = error.format_message().strip()
    if not message:  # typer has printed the help, because nothing was given
        return "a command is missing: choose one from this list."
    return f"{message.rstrip('.')}. `{name} --help` lists the options."


def _keep_traceback(error: BaseException) -> str:
    """Writes a traceback, which a user may publish in a report, without secrets and local paths to a file that only
    the user can read. Returns where it is."""
    text = redact_text("".join(traceback.format_exception(error)), command_secrets(sys.argv))
    try:
        number, path = tempfile.mkstemp(prefix="msd-hf-error-", suffix=".txt", text=True)
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as problem:
        return f"the traceback could not be written: {problem.strerror}"
    return f"the traceback is in {path}"


__all__ = ["INTERRUPTED", "exit_status"]
