"""How answers name things. What is seen decides the order of the words, and chance the choice among synonyms.

So neither the question nor the words before tell how an answer goes on: the target has to look, and a draft that does
not look guesses.
"""

from __future__ import annotations

import random

from ..world import COLOURS
from .picture import ORDINALS, Thing


NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip


def number_of(number: int, word: str) -> str:
    """A number with its noun, e.g. `"no stars"`, `"one cross"`, `"two crosses"`."""
    return f"{NUMBERS[number]} {word}" + ("" if number == 1 else "es" if word.endswith("ss") else "s")


def with_article(thing: Thing) -> str:
    """The thing with its article, e.g. `"a small red circle"`."""
    return f"a {thing.name}"


def in_column(rng: random.Random, thing: Thing) -> str:
    """The thing and its column; its colour, or the kind of sign, decides the order of the words."""
    column = f"column {ORDINALS[thing.column]}"
    holds = rng.choice(("holds", "contains", "shows"))
    if thing.text.isdigit():
        return f"in {column} the number {thing.text}"
    if thing.is_sign:
        return f"{column} {holds} the word {thing.text}"
    order = list(COLOURS).index(thing.colour) % 3
    if order == 0:
        return f"a {thing.name} in {column}"
    if order == 1:
        return f"{column} {holds} a {thing.name}"
    return f"in {column} a {thing.name}"


def fact_of(thing: Thing) -> str:
    """What an answer that names the thing by `in_column` has to contain."""
    if thing.is_sign:
        return f"number {thing.text}" if thing.text.isdigit() else f"word {thing.text}"
    return thing.name
