"""The table of refusals in `examples/SUPPORT.md`."""

from __future__ import annotations

import re
from pathlib import Path


PAGE = Path(__file__).parents[1] / "examples" / "SUPPORT.md"
HEADER = "| refused | the sentence |"


def rows() -> dict[str, str]:
    """The table: each refused call and its error message, in which `…` stands for any text."""
    table = PAGE.read_text(encoding="utf-8").split(HEADER + "\n")[1].split("\n\n")[0]
    cells = [line.strip("|").split(" | ", 1) for line in table.splitlines()[1:]]
    return {refused.strip(): sentence.strip() for refused, sentence in cells}


def names() -> set[str]:
    """The refused arguments: rows of the form `name=value`, and rows that are only a name."""
    matches = [re.match(r"`(\w+)(=.*)?`$", refused) for refused in rows()]
    return {match[1] for match in matches if match}


def matches(sentence: str, message: str) -> bool:
    """Whether an error's message is the sentence of a row."""
    pattern = ".*".join(re.escape(part) for part in sentence.split("…"))
    return re.fullmatch(pattern, message) is not None


__all__ = ["matches", "names", "rows"]
