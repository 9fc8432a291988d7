"""Questions about an album of several small pictures, whose answers have to look at one picture after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..turns import Turn, join_words
from .picture import Picture
from .wording import NUMBERS, number_of, with_article


# Albums have up to 16 pictures.
_ORDINALS = NUMBERS[1:17]


def title(number: int) -> str:
    """The name of the picture with this number, counted from 0, e.g. `"picture three"`."""
    return f"picture {_ORDINALS[number]}"


def _contents(picture: Picture) -> str:
    return join_words([with_article(thing) for thing in picture.things])


def picture(rng: random.Random, album: Sequence[Picture]) -> Turn:
    """Asks for the things in one picture."""
    number = rng.randrange(len(album))
    question = rng.choice([f"What is in {title(number)}?", f"What does {title(number)} show?"])
    lead = rng.choice(["It shows", "I see", "There is"])
    chosen = album[number]
    return Turn("picture", question, f"{lead} {_contents(chosen)}.", tuple(thing.name for thing in chosen.things))


def difference(rng: random.Random, album: Sequence[Picture]) -> Turn:
    """Asks for the difference between two pictures."""
    first, second = rng.sample(range(len(album)), 2)
    one, other = title(first), title(second)
    question = rng.choice([f"What is different between {one} and {other}?", f"Compare {one} with {other}."])
    lead = rng.choice(["The first shows", "First I see", "In the first is"])
    link = rng.choice(["the second", "in contrast the second"])
    answer = f"{lead} {_contents(album[first])}; {link} {_contents(album[second])}."
    return Turn("difference", question, answer, tuple(t.name for n in (first, second) for t in album[n].things))


def which(rng: random.Random, album: Sequence[Picture]) -> Turn:
    """Asks which picture has a thing, and answers with the rest of that picture."""
    names = [thing.name for shown in album for thing in shown.things]
    number = rng.randrange(len(album))
    things = album[number].things
    thing = rng.choice([t for t in things if names.count(t.name) == 1] or things)
    question = rng.choice([f"Which picture has the {thing.name}?", f"In which picture is the {thing.name}?"])
    others = [with_article(other) for other in things if other is not thing]
    lead, link = rng.choice(["It is in", "You find it in"]), rng.choice(["with", "next to"])
    place = f"{title(number)}, in {thing.place}"
    answer = f"{lead} {place}, {link} {join_words(others) or 'nothing else'}."
    return Turn("which", question, answer, (place, *(other.name for other in things if other is not thing)))


def counts(rng: random.Random, album: Sequence[Picture]) -> Turn:
    """Asks for the things of two pictures and their number."""
    chosen = sorted(rng.sample(range(len(album)), 2))
    question = f"Count the things of {title(chosen[0])} and {title(chosen[1])}."
    parts = []
    for number in chosen:
        things = album[number].things
        parts.append(f"{title(number)} has {_contents(album[number])}, {number_of(len(things), 'thing')}")
    link = rng.choice(["; ", ", and "])
    facts = [number_of(len(album[number].things), "thing") for number in chosen]
    return Turn(
        "counts",
        question,
        f"{link.join(parts)}.",
        (*facts, *(thing.name for number in chosen for thing in album[number].things)),
    )


def firsts(rng: random.Random, album: Sequence[Picture]) -> Turn:
    """Asks for the first thing of each of some pictures."""
    first = rng.randrange(len(album))
    chosen = range(first, min(first + 5, len(album)))
    ends = f"from {_ORDINALS[chosen[0]]} to {_ORDINALS[chosen[-1]]}"
    question = f"What is the first thing of the pictures {ends}?"
    parts = []
    for number in chosen:
        link, thing = rng.choice(["begins with", "has first"]), with_article(album[number].things[0])
        parts.append(f"{title(number)} {link} {thing}")
    return Turn("firsts", question, f"{'; '.join(parts)}.", tuple(album[n].things[0].name for n in chosen))


ALBUM_KINDS: dict[str, Callable[[random.Random, Sequence[Picture]], Turn]] = {
    "picture": picture,
    "difference": difference,
    "which": which,
    "counts": counts,
    "firsts": firsts,
}
_WEIGHTS = (4, 3, 3, 2, 2)


def make_album_turns(rng: random.Random, album: Sequence[Picture], num_turns: int) -> list[Turn]:
    """Makes `num_turns` different questions about an album."""
    turns: list[Turn] = []
    while len(turns) < num_turns:
        turn = ALBUM_KINDS[rng.choices(list(ALBUM_KINDS), _WEIGHTS)[0]](rng, album)
        if all(turn.question != t.question for t in turns):
            turns.append(turn)
    return turns
