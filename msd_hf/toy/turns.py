"""A question with its answer, the form of both text and visual questions, and the check of a model's answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question with its answer. Every string of `facts` occurs in a correct answer."""

    kind: str
    question: str
    answer: str
    facts: tuple[str, ...]


def join_words(words: Sequence[str]) -> str:
    """Joins words as `a`, `a and b`, or `a, b, and c`."""
    if len(words) < 3:
        return " and ".join(words)
    return ", ".join(words[:-1]) + ", and " + words[-1]


def has_facts(answer: str, facts: Sequence[str]) -> bool:
    """Whether every fact occurs in the answer as whole words. Case and repeated spaces are ignored."""
    if not facts:
        raise ValueError("An answer cannot be checked without facts.")
    text = " ".join(answer.lower().split())
    return all(
        re.search(rf"(?<!\w){re.escape(' '.join(fact.lower().split()))}(?!\w)", text) is not None for fact in facts
    )
