"""Links of pages: those that lead nowhere, in Markdown of the repository and in generated HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote


_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z]+:", re.IGNORECASE)


def broken_markdown_links(pages: Iterable[Path]) -> list[str]:
    """The relative links of Markdown pages to a file or a heading that does not exist, as sentences."""
    found = []
    for page in pages:
        for link in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
            if _ELSEWHERE.match(link):
                continue
            path, _, anchor = unquote(link).partition("#")
            place = (page.parent / path) if path else page
            if not place.exists():
                found.append(f"{page.name} links to {link}, which does not exist")
            elif anchor and place.suffix == ".md" and anchor not in anchors(place.read_text(encoding="utf-8")):
                found.append(f"{page.name} links to {link}, but there is no such heading")
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown page's headings, as code forges make them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (name := anchor if number == 0 else f"{anchor}-{number}") in found:
            number += 1
        found.add(name)
    return found


def broken_html_links(folder: Path) -> list[str]:
    """The relative links of HTML pages in a folder to a page or an id that does not exist, as sentences."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            if _ELSEWHERE.match(link) or link.startswith("//"):
                continue
            name, _, anchor = unquote(link).partition("#")
            place = (path.parent / name).resolve() if name else path.resolve()
            other = next((other for known, other in pages.items() if known.resolve() == place), None)
            if not place.exists() or (anchor and other is not None and anchor not in other.ids):
                found.append(f"{path.relative_to(folder)} links to {link}, which does not exist")
    return found


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.add(value)
            elif value and name == "id":
                self.ids.add(value)
