"""Where the nodes of a candidate tree stand in a picture: the root on the left, each level one column to the right."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


_LONGEST_TEXT = 18  # characters of a node
_CHARACTER, _PADDING, _GAP, _ROW, _HEIGHT = 7.3, 8, 26, 30, 22  # in pixels; the page sets the font accordingly


@dataclass(frozen=True)
class PicturedNode:
    """
    One node of a picture.

    Args:
        text: its token, shortened.
        kind: "root", "accepted", "rejected", or "bonus" for the target's own token after the accepted ones.
        title: what is shown on request.
        x, y, width, height: its box.
        line (*optional*): the ends of the line from its parent, `(x1, y1, x2, y2)`.
    """

    text: str
    kind: str
    title: str
    x: float
    y: float
    width: float
    height: float
    line: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class TreePicture:
    """The nodes of a picture, and its size."""

    nodes: list[PicturedNode]
    width: float
    height: float


def draw_tree(found: Mapping[str, Any]) -> TreePicture:
    """
    Places the nodes of a recorded round. The accepted path is a straight line at the top.

    Args:
        found: the fields of a [`~msd_hf.evaluation.recorded_rounds.RecordedRound`].
    """
    texts, parents, accepted = list(found["tokens"]), list(found["parents"]), list(found["accepted"])
    probabilities = list(found["probabilities"])
    kinds = ["rejected"] * len(texts)
    for node in accepted:
        kinds[node] = "accepted"
    kinds[0] = "root"
    if len(found["emitted"]) >= len(accepted):  # an answer may end in the middle of the path
        texts.append(found["emitted"][len(accepted) - 1])
        parents.append(accepted[-1])
        probabilities.append(None)
        kinds.append("bonus")
    depths = _depths(parents)
    rows, num_rows = _rows(parents, kinds)
    shown = [_shown(text) for text in texts]
    widths = [max(24.0, _width(text) * _CHARACTER + 2 * _PADDING) for text in shown]
    columns, right = [], 0.0
    for depth in range(max(depths) + 1):
        columns.append(right)
        right += max(width for width, own in zip(widths, depths, strict=True) if own == depth) + _GAP
    nodes = []
    for node, text in enumerate(shown):
        x, y = columns[depths[node]], rows[node] * _ROW
        parent = parents[node]
        start = (columns[depths[parent]] + widths[parent], rows[parent] * _ROW + _HEIGHT / 2)
        line = None if node == 0 else (*start, x, y + _HEIGHT / 2)
        title = _title(texts[node], kinds[node], probabilities[node])
        nodes.append(PicturedNode(text, kinds[node], title, x, y, widths[node], _HEIGHT, line))
    return TreePicture(nodes, right - _GAP + 1, (num_rows - 1) * _ROW + _HEIGHT + 1)


def _depths(parents: Sequence[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:  # a parent stands before its children
        depths.append(depths[parent] + 1)
    return depths


def _rows(parents: Sequence[int], kinds: Sequence[str]) -> tuple[list[int], int]:
    """The row of each node, and their number. The first child stands in the row of its parent, each further one below
    all nodes that were placed before."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    rows = [0] * len(parents)
    num_rows = 1
    waiting = [(0, False)]
    while waiting:  # a stack, because a path may be longer than Python recurses
        node, needs_row = waiting.pop()
        if node:
            rows[node] = num_rows if needs_row else rows[parents[node]]
        num_rows += needs_row
        on_path_first = sorted(children[node], key=lambda child: kinds[child] not in ("accepted", "bonus"))
        waiting += [(child, place > 0) for place, child in reversed(list(enumerate(on_path_first)))]
    return rows, num_rows


def _shown(text: str) -> str:
    """A token as one short line; spaces around a word are left out."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣" * len(text) or "(none)"
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _title(text: str, kind: str, probability: float | None) -> str:
    what = {"root": "last token before the round", "bonus": "the target's own token"}.get(kind, kind)
    return f"{text!r}: {what}" + (f", path probability {probability:.3g}" if probability is not None else "")


__all__ = ["PicturedNode", "TreePicture", "draw_tree"]
