"""Recordings as HTML. Text of models and users is always escaped."""

from __future__ import annotations

import html
import math

from ..terminal import printable
from .race import Frame
from .recording import DraftedTree, Recording, Round


_STEPS = {"alone": "1 · the target alone", "drafted": "2 · with the draft", "race": "3 · both by their clocks"}


def escaped(text: str) -> str:
    """A text as HTML that shows it as it is, control characters by signs."""
    return html.escape(printable(text))


def answer_markup(recording: Recording) -> str:
    """An answer, each token in the colour of its origin: drafted and accepted, or the target's own."""
    return "".join(_round_markup(number, round_) for number, round_ in enumerate(recording.rounds))


def _round_markup(number: int, round_: Round) -> str:
    accepted = round_.num_draft_tokens
    name = f"forward {number}" if number else "prefill"
    title = f"{name}: {accepted} drafted + {len(round_.tokens) - accepted} own"
    pieces = list(round_.pieces)
    if number == 0:
        pieces[0] = pieces[0].lstrip()
    tokens = [_token_markup(piece, "drafted" if index < accepted else "own") for index, piece in enumerate(pieces)]
    return f'<span title="{title}">{"".join(tokens)}</span>'


def _token_markup(piece: str, origin: str) -> str:
    word = piece.lstrip()
    space = piece[: len(piece) - len(word)]  # without colour, so that lines break between words
    return escaped(space) + (f'<span class="{origin}">{escaped(word)}</span>' if word else "")


def sides_markup(frame: Frame) -> str:
    """Both sides of the race: their clocks, figures and answers."""
    alone = _side_markup("Target alone", "each forward gives one token", frame.alone, frame.length)
    drafted = _side_markup("With the draft", "each forward checks a tree", frame.drafted, frame.length, "with-draft")
    return f'<div class="sides">{alone}{drafted}</div>'


def _side_markup(name: str, note: str, recording: Recording, length: int, kind: str = "alone") -> str:
    """
    Args:
        name, note: the heading, and a line below it.
        recording (`Recording`): the answer so far.
        length (`int`): tokens of the whole answer, as far as it is known; the bar is full there.
        kind: a class of the style sheet.
    """
    count = len(recording.tokens)
    share = 100 * count / length if length else 0
    tau = recording.tau
    figures = {
        "seconds": f"{recording.seconds:.2f}",
        "tokens": str(count),
        "tokens/s": f"{recording.tokens_per_second:.0f}" if count else "–",
        "tau": "–" if math.isnan(tau) else f"{tau:.2f}",
    }
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures.items())
    return (
        f'<section class="side {kind}"><h3>{name}</h3><p class="note">{note}</p><dl>{cells}</dl>'
        f'<div class="track"><div class="bar" style="width:{share:.1f}%"></div></div>'
        f'<div class="answer">{answer_markup(recording)}</div></section>'
    )


def trees_markup(frame: Frame) -> str:
    """The last tree of the answer, and at the end a list of all its trees."""
    drafted = [(number, round_.tree) for number, round_ in enumerate(frame.drafted.rounds)]
    trees = [_titled_tree(number, tree) for number, tree in drafted if tree is not None and len(tree.texts) > 1]
    if not trees:
        return '<p class="note">The last tree of candidates is drawn here.</p>'
    every = ""
    if frame.stage == "done":
        every = f"<details><summary>All {len(trees)} trees of this answer</summary>{''.join(trees)}</details>"
    return trees[-1] + every


def _titled_tree(number: int, tree: DraftedTree) -> str:
    counts = f"{len(tree.texts) - 1} candidates, {len(tree.accepted)} accepted"
    return f"<h4>Tree of forward {number}: {counts}</h4>{tree_markup(tree)}"


def tree_markup(tree: DraftedTree) -> str:
    """A candidate tree as nested lists, which the style sheet lays out from left to right."""
    below = [""] * len(tree.texts)  # markup of the nodes below each node
    for node in range(len(tree.texts) - 1, 0, -1):  # children before their parents
        parent = tree.parents[node]
        below[parent] = _node_markup(tree, node, below[node]) + below[parent]
    return f'<ul class="tree">{_node_markup(tree, 0, below[0])}</ul>'


def _node_markup(tree: DraftedTree, node: int, below: str) -> str:
    kind = "own" if node == 0 else "drafted" if node in tree.accepted else "rejected"
    return f'<li><span class="{kind}">{_node_text(tree.texts[node])}</span>{f"<ul>{below}</ul>" if below else ""}</li>'


def _node_text(text: str) -> str:
    return escaped(text.strip()) or ("⏎" if "\n" in text else "␣" if text else "∅")


def summary_markup(frame: Frame) -> str:
    """What is going on, and at the end what came out."""
    if frame.stage == "ready":
        return '<p class="summary">Ask a question about a picture, or click an example.</p>'
    if frame.stage == "done":
        return _result_markup(frame)
    steps = "".join(
        f'<span class="step{" now" if stage == frame.stage else ""}">{text}</span>' for stage, text in _STEPS.items()
    )
    slow = f"in slow motion: {frame.slowdown} times slower than it was" if frame.slowdown > 1 else ""
    return f'<p class="summary">{steps} {slow}</p>'


def _result_markup(frame: Frame) -> str:
    same = "the same answer, token for token"
    if not frame.is_same:
        same = "not the same answer: in dtypes of few bits a verification rounds differently from a single step"
    forwards = f"{len(frame.drafted.rounds)} forwards of the target instead of {len(frame.alone.rounds)}"
    return (
        f'<p class="summary result" data-same="{str(frame.is_same).lower()}" data-speedup="{frame.speedup:.3f}">'
        f"<strong>{frame.speedup:.1f}×</strong> as fast · {same} · {forwards}</p>"
    )


__all__ = ["answer_markup", "escaped", "sides_markup", "summary_markup", "tree_markup", "trees_markup"]
