"""Questions about a scene. The wording of the question determines the wording of the answer, the scene its content."""

from __future__ import annotations

import random
from collections.abc import Callable

from .turns import Turn, join_words
from .world import COLOURS, PLACES, SHAPES, Scene, SceneObject


NUMBERS = ("zero", "one", "two", "three", "four")
ORDINALS = ("First", "Second", "Third", "Fourth")


def _plural(number: int, word: str) -> str:
    return f"{NUMBERS[number]} {word}" + ("" if number == 1 else "es" if word.endswith("ss") else "s")


def _with_place(item: SceneObject) -> str:
    return f"a {item.full_name} in the {item.place}"


def describe(rng: random.Random, scene: Scene) -> Turn:
    """Asks for all objects of the scene; the answer names them in reading order."""
    objects, background = scene.objects, f"{scene.background} background"
    count = _plural(len(objects), "object")
    style = rng.randrange(4)
    if style == 0:
        question = rng.choice(["Describe the image.", "Please describe this image."])
        names = join_words([_with_place(o) for o in objects])
        answer = f"The image shows {count} on a {background}. There is {names}."
    elif style == 1:
        question = rng.choice(["What can you see in this picture?", "What do you see in the picture?"])
        sentences = [f"In the {o.place} there is a {o.full_name}." for o in objects]
        answer = f"I can see a picture with a {background} and {count}. {' '.join(sentences)}"
    elif style == 2:
        question = rng.choice(["List everything in the image.", "Can you list all the objects?"])
        sentences = [f"{ORDINALS[i]}, {_with_place(o)}." for i, o in enumerate(objects)]
        answer = f"Here is a list of {count}. {' '.join(sentences)} All of this is on a {background}."
    else:
        question = rng.choice(["Tell me about this image in detail.", "Explain the scene in detail."])
        sentences = [f"The {o.full_name} is in the {o.place}." for o in objects]
        answer = f"This is a scene with a {background}. {' '.join(sentences)} In total it has {count}."
    facts = [count, background, *(f"{o.full_name}" for o in objects), *(f"in the {o.place}" for o in objects)]
    return Turn("describe", question, answer, tuple(facts))


def colour(rng: random.Random, scene: Scene) -> Turn:
    """Asks for the colour of the object in a place, or of the only object with a shape."""
    item = rng.choice(scene.objects)
    only_one = sum(o.shape == item.shape for o in scene.objects) == 1
    style = rng.randrange(4 if only_one else 2)
    if style == 0:
        question = f"What colour is the object in the {item.place}?"
        answer = f"The object in the {item.place} is a {item.full_name}, so its colour is {item.colour}."
    elif style == 1:
        question = f"Tell me the colour of the thing in the {item.place} of the picture."
        subject = f"The colour of the thing in the {item.place} of the picture"
        answer = f"It is a {item.full_name}. {subject} is {item.colour}."
    elif style == 2:
        question = f"What colour is the {item.shape}?"
        answer = f"The {item.shape} in the {item.place} of the image is {item.size} and its colour is {item.colour}."
        return Turn("colour", question, answer, (f"its colour is {item.colour}", f"in the {item.place}", item.size))
    else:
        question = f"Which colour does the {item.shape} have?"
        answer = f"You can find the {item.shape} in the {item.place}. It is a {item.full_name}."
    return Turn("colour", question, answer, (item.full_name, f"in the {item.place}"))


def count(rng: random.Random, scene: Scene) -> Turn:
    """Asks for the number of all objects, or of the objects of a size; the answer lists them too."""
    style = rng.randrange(3)
    if style < 2:
        names = join_words([f"a {o.full_name}" for o in scene.objects])
        number = _plural(len(scene.objects), "object")
        verb = "is" if len(scene.objects) == 1 else "are"
        if style == 0:
            question = "How many objects are in the image?"
            answer = f"There {verb} {number} in the image: {names}."
        else:
            question = "Count the objects in the picture, please."
            answer = f"I count {names}. That makes {number} in the picture."
        return Turn("count", question, answer, (number, *(o.full_name for o in scene.objects)))
    size = rng.choice(scene.objects).size
    matching = [o for o in scene.objects if o.size == size]
    number = _plural(len(matching), f"{size} object")
    verb = "is" if len(matching) == 1 else "are"
    names = join_words([f"the {o.name} in the {o.place}" for o in matching])
    question = rng.choice([f"How many {size} objects are there?", f"What is the number of {size} objects?"])
    answer = f"There {verb} {number} in the image, namely {names}."
    return Turn("count", question, answer, (number, *(f"{o.name} in the {o.place}" for o in matching)))


def place(rng: random.Random, scene: Scene) -> Turn:
    """Asks for the place of an object that is named by colour and shape."""
    item = rng.choice(scene.objects)
    style = rng.randrange(3)
    if style == 0:
        question = f"Where is the {item.name}?"
        answer = f"The {item.name} is in the {item.place} of the image, and it is a {item.size} one."
    elif style == 1:
        question = f"In which part of the picture is the {item.name}?"
        look = f"If you look in the {item.place} of the picture"
        answer = f"{look}, you will find the {item.name}. Its size is {item.size}."
    else:
        question = f"Can you find the {item.name}?"
        answer = f"Yes, I found a {item.full_name}. It is in the {item.place} on the {scene.background} background."
    return Turn("place", question, answer, (f"in the {item.place}", item.size, item.shape))


def exists(rng: random.Random, scene: Scene) -> Turn:
    """Asks whether the scene has an object that is named by colour and shape. Half of the answers are no."""
    item = rng.choice(scene.objects)
    style = rng.randrange(2)
    name, present = item.name, rng.random() < 0.5
    while not present and any(o.name == name for o in scene.objects):
        # Often the name has the right shape or the right colour, so that one attribute does not give the answer away.
        swap = rng.randrange(3)
        shape = item.shape if swap == 0 else rng.choice(SHAPES)
        tint = item.colour if swap == 1 else rng.choice(list(COLOURS))
        name = f"{tint} {shape}"
    others = join_words([f"a {o.name}" for o in scene.objects])
    if style == 0:
        question = f"Is there a {name} in the image?"
        if present:
            answer = f"Yes, there is a {item.full_name} in the {item.place} of the image."
        else:
            answer = f"No, there is no {name} in the image. It only shows {others}."
    else:
        question = f"Does the picture have a {name}?"
        if present:
            answer = f"Yes, the picture has a {item.full_name}, and you can see it in the {item.place}."
        else:
            answer = f"No, the picture does not have a {name}. What it does have is {others}."
    facts = ("Yes", item.full_name, f"in the {item.place}") if present else ("No", *(o.name for o in scene.objects))
    return Turn("exists", question, answer, facts)


def background(rng: random.Random, scene: Scene) -> Turn:
    """Asks for the colour of the background."""
    number = _plural(len(scene.objects), "object")
    verb = "is" if len(scene.objects) == 1 else "are"
    if rng.randrange(2) == 0:
        question = "What colour is the background?"
        answer = f"The background of the image is {scene.background}, and there {verb} {number} on top of it."
        return Turn("background", question, answer, (f"is {scene.background}", number))
    question = "Which background does this picture have?"
    answer = f"This picture has a {scene.background} background with {number} on it."
    return Turn("background", question, answer, (f"{scene.background} background", number))


def compare(rng: random.Random, scene: Scene) -> Turn:
    """Asks for a comparison of the objects in two places. One place may be empty."""
    first = rng.choice(scene.objects)
    if len(scene.objects) > 1 and rng.random() < 0.8:
        other_cell = rng.choice([o.cell for o in scene.objects if o is not first])
    else:
        other_cell = rng.choice([cell for cell in range(len(PLACES)) if cell != first.cell])
    second = next((o for o in scene.objects if o.cell == other_cell), None)
    seen = f"a {second.full_name}" if second else "nothing"
    other_place = PLACES[other_cell]
    if rng.randrange(2) == 0:
        question = f"Compare the {first.place} with the {other_place}."
        answer = f"In the {first.place} there is a {first.full_name}, while in the {other_place} there is {seen}."
    else:
        question = f"What is different between the {first.place} and the {other_place}?"
        answer = f"The {first.place} holds a {first.full_name}, but the {other_place} holds {seen}."
    return Turn("compare", question, answer, (first.full_name, seen, first.place, other_place))


VISUAL_KINDS: dict[str, Callable[[random.Random, Scene], Turn]] = {
    "describe": describe,
    "colour": colour,
    "count": count,
    "place": place,
    "exists": exists,
    "background": background,
    "compare": compare,
}
_WEIGHTS = (4, 2, 2, 2, 3, 1, 3)


def make_visual_turns(rng: random.Random, scene: Scene, num_turns: int) -> list[Turn]:
    """Makes `num_turns` different questions about one scene. Descriptions are the most frequent kind."""
    turns: list[Turn] = []
    while len(turns) < num_turns:
        kind = rng.choices(list(VISUAL_KINDS), _WEIGHTS)[0]
        turn = VISUAL_KINDS[kind](rng, scene)
        repeated = any(turn.question == t.question for t in turns) or (
            kind == "describe" and any(t.kind == "describe" for t in turns)
        )
        if not repeated:
            turns.append(turn)
    return turns
