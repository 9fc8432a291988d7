"""Text-only questions: counting, word lists, stories, how-to lists and the calendar.

Each task has a key that names its content without the phrasing. The key determines the split, so that no phrasing of a
held-out task occurs in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .turns import Turn, join_words
from .vocabulary import ANIMALS, DAYS, DISHES, INGREDIENTS, MONTHS, NAMES, ONES, SETTINGS, TENS, WORDS
from .world import split_of


@dataclass(frozen=True)
class TextTask:
    """A first turn, the key of its content and the turns that may follow it."""

    key: str
    turn: Turn
    follow_ups: tuple[Turn, ...] = ()


def number_name(number: int) -> str:
    """The English name of a number from 0 to 99."""
    if not 0 <= number < 100:
        raise ValueError(f"Only the numbers 0 to 99 have a name here, got {number}.")
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")


def counting(rng: random.Random) -> TextTask:
    """A task to count up or down between two numbers."""
    start, length, down = rng.randint(1, 80), rng.randint(5, 11), rng.random() < 0.4
    stop = start + length - 1
    numbers = [number_name(number) for number in range(start, stop + 1)]
    up_text, down_text = ", ".join(numbers), ", ".join(numbers[::-1])
    low, high = numbers[0], numbers[-1]
    if down:
        question = rng.choice([f"Count down from {high} to {low}.", f"Please count backwards from {high} to {low}."])
        answer = f"Counting down from {high} to {low} gives {down_text}."
        again = f"Counting up from {low} to {high} gives {up_text}."
        follow = Turn("follow_up", "Now count up again.", again, (up_text,))
    else:
        question = rng.choice([f"Count from {low} to {high}.", f"Please count up from {low} to {high}."])
        answer = f"Counting up from {low} to {high} gives {up_text}."
        again = f"Counting down from {high} to {low} gives {down_text}."
        follow = Turn("follow_up", "Now count back down.", again, (down_text,))
    turn = Turn("counting", question, answer, (down_text if down else up_text,))
    return TextTask(f"counting {low} {high} {down}", turn, (follow,))


def _first_and_last(words: list[str]) -> Turn:
    answer = f"The first word of my list is {words[0]} and the last word of my list is {words[-1]}."
    return Turn("follow_up", "What are the first and last words?", answer, (f"is {words[0]}", f"is {words[-1]}"))


def sorting(rng: random.Random) -> TextTask:
    """A task to put words into alphabetical order."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    ordered = sorted(words)
    before, after = ", ".join(words), ", ".join(ordered)
    if rng.random() < 0.5:
        question = f"Sort these words: {before}."
        answer = f"The sorted words are {after}. They are now in alphabetical order."
    else:
        question = f"Put these words in alphabetical order: {before}."
        answer = f"In alphabetical order the words are {after}."
    turn = Turn("sorting", question, answer, (after,))
    return TextTask(f"words {' '.join(ordered)}", turn, (_first_and_last(ordered),))


def repeating(rng: random.Random) -> TextTask:
    """A task to repeat a list of words, once or twice."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    text = ", ".join(words)
    style = rng.randrange(3)
    if style == 0:
        question, answer = f"Repeat after me: {text}.", f"You said {text}."
    elif style == 1:
        question, answer = f"Say this list twice: {text}.", f"The first time: {text}. The second time: {text}."
    else:
        question = f"Remember these words: {text}."
        answer = f"I will remember the words {join_words(words)}."
        text = join_words(words)
    turn = Turn("repeating", question, answer, (text,))
    return TextTask(f"words {' '.join(sorted(words))}", turn, (_first_and_last(words),))


def story(rng: random.Random) -> TextTask:
    """A task to tell a short story about a person, an animal and a place."""
    name, animal, setting = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(SETTINGS)
    style = rng.randrange(4)
    if style == 0:
        question = f"Tell me a story about {name}, a {animal} and the {setting}."
        answer = (
            f"One day {name} walked to the {setting} and met a {animal}. The {animal} was hungry, so {name} shared"
            f" some bread with it. From that day on {name} and the {animal} were best friends."
        )
    elif style == 1:
        question = f"Write a sad story about {name} and a {animal} at the {setting}."
        answer = (
            f"{name} had a {animal} that lived near the {setting}. One night the {animal} got lost in the rain, and"
            f" {name} cried for a long time. The {setting} was very quiet after that."
        )
    elif style == 2:
        question = f"Write a funny story about {name} and a {animal} at the {setting}."
        answer = (
            f"At the {setting} there was a {animal} with a big red hat. {name} laughed and asked to try it on. The"
            f" {animal} said no, and danced around the {setting} until {name} laughed again."
        )
    else:
        question = f"Make up a story: {name}, {animal}, {setting}."
        answer = (
            f"Once upon a time, {name} found a map of the {setting}. A clever {animal} could read the map, so they"
            f" searched together. In the end {name} and the {animal} found a box of gold."
        )
    where = f"The story about {name} happens at the {setting}."
    follow_ups = (
        Turn("follow_up", "Where does the story happen?", where, (setting,)),
        Turn("follow_up", "Who is in the story?", f"The story is about {name} and a {animal}.", (name, animal)),
    )
    turn = Turn("story", question, answer, (name, animal, setting))
    return TextTask(f"story {name} {animal} {setting}", turn, follow_ups)


def howto(rng: random.Random) -> TextTask:
    """A task to give a recipe for a dish from three ingredients."""
    dish = rng.choice(DISHES)
    first, second, third = rng.sample(INGREDIENTS, 3)
    if rng.random() < 0.5:
        question = f"How do I make a {dish} with {first}, {second} and {third}?"
        answer = (
            f"To make a {dish}, follow these steps. 1. Wash the {first}. 2. Cut the {second}. 3. Cook the {third} for"
            f" ten minutes. 4. Mix the {first}, the {second} and the {third}. 5. Serve the {dish}."
        )
    else:
        question = f"Give me a recipe for a {dish} from {first}, {second} and {third}."
        answer = (
            f"Here is a recipe for a {dish}. Start with a bowl of {first} and add some {second}. Then put the {third}"
            f" on top and wait for one hour. Your {dish} with {first} and {second} is ready."
        )
    ingredients = (first, second, third)
    buy = f"You need to buy {first}, {second} and {third}."
    follow = Turn("follow_up", "What do I need to buy?", buy, ingredients)
    turn = Turn("howto", question, answer, (*ingredients, dish))
    return TextTask(f"howto {dish} {first} {second} {third}", turn, (follow,))


def calendar(rng: random.Random) -> TextTask:
    """A task to name the days of the week, or the months, that follow a given one."""
    names, unit = (DAYS, "days") if rng.random() < 0.4 else (MONTHS, "months")
    start, length, name = rng.randrange(len(names)), rng.randint(3, 10), rng.choice(NAMES)
    listed = [names[(start + step) % len(names)] for step in range(1, length + 1)]
    text, number = ", ".join(listed), number_name(length)
    if rng.random() < 0.5:
        question = f"{name} asks: which {number} {unit} come after {names[start]}?"
        answer = f"The {number} {unit} after {names[start]} are {text}, {name}."
    else:
        question = f"It is {names[start]} and {name} has to wait for {number} {unit}. Name them."
        answer = f"After {names[start]}, {name} has to wait for {text}. These are {number} {unit}."
    last = f"The last one of the {number} {unit} is {listed[-1]}."
    follow = Turn("follow_up", "Which one is the last?", last, (f"is {listed[-1]}",))
    key = f"calendar {name} {names[start]} {length}"
    return TextTask(key, Turn("calendar", question, answer, (text,)), (follow,))


TextKinds = Mapping[str, Callable[[random.Random], TextTask]]
TEXT_KINDS: TextKinds = {
    "counting": counting,
    "sorting": sorting,
    "repeating": repeating,
    "story": story,
    "howto": howto,
    "calendar": calendar,
}


def make_text_task(rng: random.Random, split: str, kind: str | None = None, kinds: TextKinds = TEXT_KINDS) -> TextTask:
    """Makes a random task of `kind` (by default of any of `kinds`) whose content belongs to `split`."""
    while True:
        task = kinds[kind or rng.choice(list(kinds))](rng)
        if split_of(task.key) == split:
            return task


def make_text_turns(rng: random.Random, split: str, num_turns: int) -> list[Turn]:
    """Makes a conversation of `num_turns` turns: tasks of the split, some of them with a follow-up question."""
    turns: list[Turn] = []
    while len(turns) < num_turns:
        task = make_text_task(rng, split)
        if any(task.turn.question == turn.question for turn in turns):
            continue
        turns.append(task.turn)
        if len(turns) < num_turns and task.follow_ups and rng.random() < 0.6:
            turns.append(rng.choice(task.follow_ups))
    return turns
