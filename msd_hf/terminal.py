"""Printing on a terminal: text from outside is shown as it is, and never read as markup or as control codes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment


# Control characters, marks that override the direction of text, and halves of surrogate pairs, in which Python keeps
# the bytes of file names and arguments that are not UTF-8. Line breaks and tabs are text.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in which characters that would control a terminal, or could not be printed, are shown by a sign."""
    return _HARMFUL.sub(_sign, text)


def one_line(text: str) -> str:
    """A text as one printable line."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))


def make_console(**arguments: Any) -> Console:
    """A `rich.console.Console` that shows each text as it is: no markup, no emoji codes, no control characters."""
    console = Console(markup=False, emoji=False, highlight=False, **arguments)
    console.push_render_hook(_ShowsControls())
    return console


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)  # the pictures of control characters: ␛
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


class _ShowsControls(RenderHook):
    """Makes all output of a console printable, in tables and styled texts too. Styles are not part of the texts."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(renderable) for renderable in renderables]


class _Printable:
    def __init__(self, renderable: RenderableType):
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = console.render(self.renderable, options)
        for segment in segments:
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.renderable)


__all__ = ["make_console", "one_line", "printable"]
