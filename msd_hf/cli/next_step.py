"""The last line of a command: the command that usually comes next."""

from __future__ import annotations

import shlex
import sys

from ..terminal import make_console, one_line


_console = make_console(stderr=True, soft_wrap=True)


def print_next(*arguments: object) -> None:
    """
    Prints `next: msd-hf ARGUMENTS` as a line that can be pasted into a shell. It goes to standard error, so that what
    a program reads from standard output is the result alone.

    Args:
        arguments: of the next command. A word in capitals stands for what only the user knows.
    """
    print_command("msd-hf", *arguments)


def print_command(*words: object) -> None:
    """Prints the next command as [`print_next`] does, also one of another program."""
    if sys.stdout is not None:  # closed by the caller
        sys.stdout.flush()
    _console.print(one_line(f"next: {shlex.join(map(str, words))}"))


__all__ = ["print_command", "print_next"]
