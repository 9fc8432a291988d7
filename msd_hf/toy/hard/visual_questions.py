"""Questions about one picture of many things, whose answers have to look at one cell after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..turns import Turn, join_words
from ..world import COLOURS, SHAPES
from .picture import ORDINALS, Picture, Thing
from .wording import fact_of, in_column, number_of, with_article


def _row(picture: Picture, row: int) -> list[Thing]:
    return [thing for thing in picture.things if thing.row == row]


def _list_row(rng: random.Random, things: Sequence[Thing]) -> str:
    return "; ".join(in_column(rng, thing) for thing in things) or "nothing"


def row(rng: random.Random, picture: Picture) -> Turn:
    """Asks for all things in a row."""
    number = rng.randrange(picture.grid)
    things = _row(picture, number)
    name = f"row {ORDINALS[number]}"
    question = rng.choice([f"What is in {name}?", f"List the things in {name}.", f"Go through {name} for me."])
    total = number_of(len(things), "thing")
    lead = rng.choice([f"In {name} I see", f"Looking at {name} I find", f"The content of {name} is"])
    answer = f"{lead}: {_list_row(rng, things)}. {rng.choice(['That makes', 'In all that is'])} {total}."
    return Turn("row", question, answer, (total, *map(fact_of, things)))


def cell(rng: random.Random, picture: Picture) -> Turn:
    """Asks for what a cell and the cell below it hold."""
    thing = rng.choice(picture.things)
    row_number = thing.row if rng.random() < 0.8 else rng.randrange(picture.grid)
    held = {(other.row, other.column): other for other in picture.things}
    here, below = held.get((row_number, thing.column)), held.get((row_number + 1, thing.column))
    place = f"row {ORDINALS[row_number]}, column {ORDINALS[thing.column]}"
    question = rng.choice([f"What is in {place}?", f"Which thing do you see in {place}?", f"Tell me about {place}."])
    found = with_article(here) if here else "nothing"
    under = with_article(below) if below else "nothing"
    lead = rng.choice(["That cell holds", "There I see", "It is"])
    answer = f"{lead} {found}, and {rng.choice(['below it', 'under it'])} is {under}."
    return Turn("cell", question, answer, (f"{found}, and", f"is {under}"))


def find(rng: random.Random, picture: Picture) -> Turn:
    """Asks for the place of a thing, and answers with its neighbours too."""
    names = [thing.name for thing in picture.things]
    thing = rng.choice([t for t in picture.things if names.count(t.name) == 1] or picture.things)
    held = {(other.row, other.column): other for other in picture.things}
    left, right = held.get((thing.row, thing.column - 1)), held.get((thing.row, thing.column + 1))
    name = f"the {thing.name}"
    question = rng.choice([f"Where is {name}?", f"Find {name}.", f"In which place is {name}?"])
    on_left, on_right = (with_article(other) if other else "nothing" for other in (left, right))
    answer = (
        f"{rng.choice(['It is in', 'You find it in', 'Look in'])} {thing.place}. "
        f"{rng.choice(['Left of it', 'On its left'])} is {on_left}, and on the right {on_right}."
    )
    return Turn("find", question, answer, (thing.place, f"is {on_left}, and", f"right {on_right}"))


def count(rng: random.Random, picture: Picture) -> Turn:
    """Asks for the number of the things of a kind, which the answer lists."""
    style = rng.randrange(3)
    if style == 0:
        shape = rng.choice(SHAPES)
        noun, chosen = shape, [thing for thing in picture.things if thing.shape == shape]
    elif style == 1:
        colour = rng.choice(list(COLOURS))
        noun, chosen = f"{colour} thing", [thing for thing in picture.things if thing.colour == colour]
    else:
        noun, chosen = "sign", [thing for thing in picture.things if thing.is_sign]
    plural = number_of(2, noun).removeprefix("two ")
    question = rng.choice([f"How many {plural} are there?", f"Count the {plural}."])
    names = [f"{with_article(thing)} in row {ORDINALS[thing.row]}" for thing in chosen]
    total = number_of(len(chosen), noun)
    lead = rng.choice(["I count", "I go through them", "Here they are"])
    answer = f"{lead}: {', '.join(names) or 'nothing'}. {rng.choice(['That makes', 'In all that is'])} {total}."
    return Turn("count", question, answer, (total, *(thing.name for thing in chosen)))


def read(rng: random.Random, picture: Picture) -> Turn:
    """Asks for the texts of all signs."""
    signs = [thing for thing in picture.things if thing.is_sign]
    question = rng.choice(["What do the signs say?", "Read all the signs.", "Read the numbers and words."])
    if not signs:
        return Turn("read", question, "There is nothing to read in this picture.", ("nothing to read",))
    parts = [
        f"{sign.text} in {sign.place}" if sign.text.isdigit() else f"in row {ORDINALS[sign.row]} it says {sign.text}"
        for sign in signs
    ]
    lead = rng.choice(["I can read", "The signs say", "This is written there"])
    return Turn("read", question, f"{lead}: {'; '.join(parts)}.", tuple(sign.text for sign in signs))


def compare(rng: random.Random, picture: Picture) -> Turn:
    """Asks which of two rows holds more."""
    first, second = rng.sample(range(picture.grid), 2)
    left, right = _row(picture, first), _row(picture, second)
    one, other = f"row {ORDINALS[first]}", f"row {ORDINALS[second]}"
    question = rng.choice([f"Compare {one} with {other}.", f"Which has more things, {one} or {other}?"])
    names = [join_words([with_article(thing) for thing in things]) or "nothing" for things in (left, right)]
    if len(left) == len(right):
        verdict = "Both have the same number"
    else:
        more = one if len(left) > len(right) else other
        verdict = f"There is more in {more}"
    answer = f"First {names[0]}, {rng.choice(['then', 'second'])} {names[1]}. {verdict}."
    return Turn("compare", question, answer, (verdict, *(thing.name for thing in (*left, *right))))


def describe(rng: random.Random, picture: Picture) -> Turn:
    """Asks for everything, row by row."""
    question = rng.choice(["Describe the picture.", "What does the picture show?", "Describe everything you see."])
    parts = [
        f"Row {ORDINALS[number]}: {_list_row(rng, things)}."
        for number in range(picture.grid)
        if (things := _row(picture, number))
    ]
    lead = rng.choice(["It has a", "I see a", "There is a"])
    answer = f"{lead} {picture.background} ground. {' '.join(parts)}"
    return Turn("describe", question, answer, (f"{picture.background} ground", *map(fact_of, picture.things)))


PICTURE_KINDS: dict[str, Callable[[random.Random, Picture], Turn]] = {
    "row": row,
    "cell": cell,
    "find": find,
    "count": count,
    "read": read,
    "compare": compare,
    "describe": describe,
}
_WEIGHTS = (4, 3, 3, 3, 2, 2, 2)


def make_picture_turns(rng: random.Random, picture: Picture, num_turns: int) -> list[Turn]:
    """Makes `num_turns` different questions about a picture. At most one of them, the last, asks for everything:
    answers to later ones could be found in its answer, and the picture need not be looked at."""
    turns: list[Turn] = []
    while len(turns) < num_turns:
        kind = rng.choices(list(PICTURE_KINDS), _WEIGHTS)[0]
        turn = PICTURE_KINDS[kind](rng, picture)
        if any(turn.question == t.question or kind == t.kind == "describe" for t in turns):
            continue
        turns.append(turn)
    return sorted(turns, key=lambda turn: turn.kind == "describe")
