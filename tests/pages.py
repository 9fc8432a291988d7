"""The pages of the repository, and the code in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "examples/*.md", "model_cards/*.md", "tests/golden/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it speaks of earlier states
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return [code for name, code in _BLOCK.findall(path.read_text(encoding="utf-8")) if name == language]


def commands(path: Path) -> list[str]:
    """The command lines of a page: continued lines joined, comments left out, `&&` taken apart."""
    lines: list[str] = []
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines() if "python -c" not in block else [block]:
            words = shlex.split(line, comments=True)
            parts = shlex.join(words).split(" '&&' ")
            lines += [part for part in parts if part]
    return lines
