"""Text tasks whose answers are not known by heart: sums, orders, facts and words of the prompt, synonyms by chance."""

from __future__ import annotations

import random

from ..text_questions import TextKinds, TextTask, make_text_task
from ..turns import Turn
from ..vocabulary import ANIMALS, INGREDIENTS, NAMES, SETTINGS, WORDS


# Each word and the one that stands for it in other words.
SYNONYMS = {
    "big": "huge", "small": "tiny", "old": "ancient", "new": "modern", "fast": "quick", "slow": "lazy",
    "happy": "glad", "sad": "gloomy", "loud": "noisy", "calm": "quiet", "rich": "wealthy", "brave": "bold",
    "dog": "hound", "cat": "kitten", "boy": "lad", "girl": "lass", "king": "ruler", "doctor": "medic",
    "teacher": "tutor", "cook": "chef", "thief": "robber", "child": "kid", "road": "street", "house": "home",
    "forest": "wood", "hill": "mound", "ship": "boat", "shop": "store", "gift": "present", "stone": "rock",
    "sees": "spots", "takes": "grabs", "likes": "loves", "needs": "wants", "builds": "makes", "sells": "trades",
    "leaves": "quits", "opens": "unlocks", "breaks": "smashes", "visits": "meets",
}  # fmt: skip
_WORDS = list(SYNONYMS)
_ADJECTIVES, _PEOPLE, _PLACES, _VERBS = _WORDS[:12], _WORDS[12:22], _WORDS[22:30], _WORDS[30:]


def sums(rng: random.Random) -> TextTask:
    """A task to add four to seven small numbers, step by step."""
    numbers = [rng.randint(2, 9) for _ in range(rng.randint(4, 7))]
    question = f"{rng.choice(['What is', 'Add', 'Work out'])} {' + '.join(map(str, numbers))}."
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    lead = rng.choice(["Step by step", "Here is the sum", "Let me see"])
    end = rng.choice(["The sum is", "The result is", "Together that is"])
    turn = Turn("sums", question, f"{lead}: {', '.join(steps)}. {end} {total}.", (f"is {total}",))
    return TextTask(f"sums {numbers}", turn)


def orders(rng: random.Random) -> TextTask:
    """A task to put names or numbers in order, forwards or backwards."""
    is_name, backwards = rng.random() < 0.5, rng.random() < 0.5
    size = rng.randint(3, 6)
    items = rng.sample(NAMES, size) if is_name else [str(number) for number in rng.sample(range(10, 100), size)]
    ordered = sorted(items, reverse=backwards)
    what = "names" if is_name else "numbers"
    how = {
        (True, False): "by the alphabet",
        (True, True): "from Z to A",
        (False, False): "from small to large",
        (False, True): "from large to small",
    }[is_name, backwards]
    question = f"{rng.choice(['Order', 'Sort', 'Arrange'])} these {what} {how}: {', '.join(items)}."
    lead = rng.choice(["Sure", "Of course", "Here you are"])
    text = ", ".join(ordered)
    answer = f"{lead}: {text}. The first is {ordered[0]} and the last is {ordered[-1]}."
    return TextTask(f"orders {items} {backwards}", Turn("orders", question, answer, (text,)))


def owners(rng: random.Random) -> TextTask:
    """Questions about who has how many of what."""
    size = rng.randint(3, 5)
    names = rng.sample(NAMES, size)
    counts = rng.sample(range(2, 20), size)
    goods = rng.sample(INGREDIENTS, size)
    given = " ".join(
        f"{name} {rng.choice(['has', 'owns', 'buys'])} {count} {good}."
        for name, count, good in zip(names, counts, goods, strict=True)
    )
    most, fewest = counts.index(max(counts)), counts.index(min(counts))
    if rng.random() < 0.5:
        question = f"{given} What is the most, and what the fewest?"
        answer = (
            f"{rng.choice(['The most are', 'First come'])} {counts[most]} {goods[most]}, and "
            f"{rng.choice(['the fewest', 'the least'])} are {counts[fewest]} {goods[fewest]}. "
            f"Together that is {counts[most] + counts[fewest]}."
        )
        facts = tuple(f"{counts[n]} {goods[n]}" for n in (most, fewest))
    else:
        asked = rng.sample(range(size), 2)
        question = f"{given} What do {names[asked[0]]} and {names[asked[1]]} have?"
        parts = [f"{names[n]} {rng.choice(['has', 'owns'])} {counts[n]} {goods[n]}" for n in asked]
        total = sum(counts[n] for n in asked)
        answer = f"{parts[0]}, {rng.choice(['and', 'while'])} {parts[1]}. Together that is {total}."
        facts = tuple(f"{counts[n]} {goods[n]}" for n in asked)
    return TextTask(f"owners {names} {counts} {goods}", Turn("owners", question, answer, facts))


def rewrite(rng: random.Random) -> TextTask:
    """A task to say sentences in other words."""
    sentences = [
        [
            "The", rng.choice(_ADJECTIVES), rng.choice(_PEOPLE), rng.choice(_VERBS), "the", rng.choice(_ADJECTIVES),
            rng.choice([*_PLACES, *_PEOPLE]),
        ]
        for _ in range(rng.randint(2, 3))
    ]  # fmt: skip
    text = " ".join(f"{' '.join(words)}." for words in sentences)
    other = " ".join(f"{' '.join(SYNONYMS.get(word, word) for word in words)}." for words in sentences)
    question = rng.choice([f"Say it in other words: {text}", f"Use synonyms: {text}", f"Rewrite this: {text}"])
    lead = rng.choice(["In other words:", "You could say:", "Here it is:"])
    return TextTask(f"rewrite {text}", Turn("rewrite", question, f"{lead} {other}", (other,)))


def story(rng: random.Random) -> TextTask:
    """A task to tell a story of a person, an animal, a place and a number, told with words of chance."""
    name, friend = rng.sample(NAMES, 2)
    say = rng.choice
    animal, setting, count, goods = say(ANIMALS), say(SETTINGS), rng.randint(10, 99), say(INGREDIENTS)
    word = say(WORDS)
    question = say(
        [
            f"Tell a story about {name}, {friend}, a {animal}, the {setting}, {count} {goods} and the word {word}.",
            f"Write about {name} and {friend} at the {setting} with a {animal}, {count} {goods} and the word {word}.",
        ]
    )
    mood, time = say(["cold", "warm", "dark", "bright", "windy"]), say(["morning", "evening", "day", "night"])
    went, found = say(["walked", "ran", "went", "hurried"]), say(["found", "met", "saw", "heard"])
    kind = say(["hungry", "clever", "tired", "gentle", "shy"])
    parts = [
        f"One {mood} {time} {name} {went} to the {setting} and {found} a {kind} {animal}.",
        f"{friend} {say(['came', 'arrived', 'followed'])} with {count} {goods} and "
        f"{say(['shared', 'gave away', 'cooked', 'dropped'])} {say(['all', 'some', 'most', 'half'])} of them.",
        f"The {animal} {say(['said', 'whispered', 'sang', 'shouted'])} {word}, and "
        f"{say([name, friend])} {say(['laughed', 'smiled', 'cried', 'danced'])}.",
    ]
    if say([True, False]):
        parts.append(
            f"{say(['Later', 'Soon', 'Then', 'At last'])} they {say(['slept', 'sat', 'played', 'rested'])} "
            f"{say(['near', 'in', 'behind'])} the {setting}."
        )
    facts = (name, friend, animal, setting, f"{count} {goods}", word)
    return TextTask(f"story {facts}", Turn("story", question, " ".join(parts), facts))


TEXT_KINDS: TextKinds = {
    "sums": sums,
    "orders": orders,
    "owners": owners,
    "rewrite": rewrite,
    "story": story,
}


def make_text_turns(rng: random.Random, split: str, num_turns: int) -> list[Turn]:
    """Makes a conversation of `num_turns` tasks."""
    return [make_text_task(rng, split, kinds=TEXT_KINDS).turn for _ in range(num_turns)]
