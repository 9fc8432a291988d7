"""Conversations of the hard world in LLaVA style, with their pictures, and held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ..text_questions import make_text_task
from ..turns import Turn
from ..world import check_split
from .album_questions import ALBUM_KINDS, make_album_turns, title
from .picture import Picture, make_picture, render
from .text_questions import TEXT_KINDS, make_text_turns
from .visual_questions import PICTURE_KINDS, make_picture_turns


IMAGE_TAG = "<image>"
# What a conversation is about, with the range of its number of turns. A tiny picture has 64 visual tokens, a small one
# 144, a large one 576; an album has 2 to 16 pictures of 64, a gallery 4 large ones, 2,304 together.
SampleKind = Literal["text", "tiny", "small", "large", "album", "gallery"]
NUM_TURNS: dict[SampleKind, tuple[int, int]] = {
    "text": (2, 4),
    "tiny": (4, 8),
    "small": (6, 10),
    "large": (10, 14),
    "album": (6, 10),
    "gallery": (6, 8),
}
_GRIDS: dict[SampleKind, int] = {"tiny": 2, "small": 3, "large": 6, "album": 2, "gallery": 6}
_GALLERY_SIZE = 4


@dataclass(frozen=True)
class HardPrompt:
    """A single held-out question about `images` (RGB, of one size). `answer` is the reference, and `facts` are the
    strings that a correct answer contains."""

    question: str
    answer: str
    kind: str
    about: SampleKind
    facts: tuple[str, ...]
    images: tuple[Image.Image, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat for `processor.apply_chat_template`. The processor gets the images separately."""
        return [{"role": "user", "content": _parts(self.question, len(self.images))}]


def _parts(question: str, num_images: int) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number in range(num_images):
        if num_images > 1:
            parts.append({"type": "text", "text": f"{title(number)}: "})
        parts.append({"type": "image"})
    return [*parts, {"type": "text", "text": question}]


def _first_turn(question: str, num_images: int) -> str:
    return "".join(IMAGE_TAG if part["type"] == "image" else part["text"] for part in _parts(question, num_images))


def make_album(rng: random.Random, split: str, kind: SampleKind, num_pictures: int | None = None) -> list[Picture]:
    """The pictures of a conversation: none for `"text"`, one for `"tiny"`, `"small"` and `"large"`. The number of
    pictures of an album or a gallery can be given."""
    if kind == "text":
        return []
    if num_pictures is None and kind == "album":
        num_pictures = rng.randint(2, 10) if rng.random() < 0.7 else rng.randint(2, 16)
    elif kind in ("tiny", "small", "large"):
        num_pictures = 1
    return [make_picture(rng, split, _GRIDS[kind]) for _ in range(num_pictures or _GALLERY_SIZE)]


def make_turns(
    rng: random.Random, split: str, kind: SampleKind, pictures: Sequence[Picture], number: int
) -> list[Turn]:
    """Makes `number` questions with answers."""
    if kind == "text":
        return make_text_turns(rng, split, number)
    if kind in ("album", "gallery"):
        return make_album_turns(rng, pictures, number)
    return make_picture_turns(rng, pictures[0], number)


def make_sample(split: str, index: int, seed: int, kind: SampleKind) -> dict[str, Any]:
    """Makes sample `index` of the endless stream that `split`, `seed` and `kind` determine.

    The sample is a LLaVA entry with `id` and `conversations`, and has `pictures` (for `render`).
    """
    check_split(split)
    if kind not in NUM_TURNS:
        raise ValueError(f"Unknown kind of sample {kind!r}: choose one of {', '.join(NUM_TURNS)}.")
    rng = random.Random(f"hard/{split}/{kind}/{seed}/{index}")
    pictures = make_album(rng, split, kind)
    turns = make_turns(rng, split, kind, pictures, rng.randint(*NUM_TURNS[kind]))
    conversations = []
    for place, turn in enumerate(turns):
        question = _first_turn(turn.question, len(pictures)) if place == 0 else turn.question
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    return {"id": f"{split}-{kind}-{seed}-{index:06d}", "conversations": conversations, "pictures": pictures}


class HardSamples(Sequence[dict[str, Any]]):
    """The first `num_samples` conversations of a split as data for `load_conversations`; the given kinds take turns.
    Samples are made, and pictures drawn, when they are indexed."""

    def __init__(self, split: str, num_samples: int, seed: int, *kinds: SampleKind):
        self.split, self.num_samples, self.seed, self.kinds = split, num_samples, seed, kinds

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.num_samples))]
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(index)
        number, place = divmod(index % self.num_samples, len(self.kinds))
        sample = make_sample(self.split, number, self.seed, self.kinds[place])
        pictures = sample.pop("pictures")
        return {**sample, "image": [render(picture) for picture in pictures]} if pictures else sample


KINDS: dict[str, SampleKind] = {
    **dict.fromkeys(TEXT_KINDS, "text"),
    **dict.fromkeys(PICTURE_KINDS, "large"),
    **dict.fromkeys(ALBUM_KINDS, "album"),
}


KIND_GROUPS = {"picture": tuple(PICTURE_KINDS), "album": tuple(ALBUM_KINDS), "text": tuple(TEXT_KINDS)}


def make_evaluation_prompts(prompts_per_kind: int, seed: int, split: str = "test") -> list[HardPrompt]:
    """Makes `prompts_per_kind` held-out questions of each kind."""
    return [prompt for kind in KINDS for prompt in make_prompts(split, prompts_per_kind, seed, kind)]


def make_prompts(
    split: str,
    num_prompts: int,
    seed: int,
    kind: str,
    about: SampleKind | None = None,
    num_pictures: int | None = None,
) -> list[HardPrompt]:
    """
    Makes `num_prompts` questions of one kind.

    Args:
        kind: a key of `KINDS`.
        about: what the questions are about, instead of what `KINDS` says.
        num_pictures: the number of pictures of an album or a gallery.
    """
    check_split(split)
    if kind not in KINDS:
        raise ValueError(f"Unknown question kind {kind!r}: choose one of {', '.join(KINDS)}.")
    about = about or KINDS[kind]
    fitting = {"text": ("text",), "large": ("tiny", "small", "large"), "album": ("album", "gallery")}[KINDS[kind]]
    if about not in fitting:
        raise ValueError(f"Questions of kind {kind!r} are about one of {', '.join(fitting)}, got {about!r}.")
    rng = random.Random(f"hard/{split}/prompts/{seed}/{kind}")
    prompts = []
    for _ in range(num_prompts):
        pictures = make_album(rng, split, about, num_pictures)
        if about == "text":
            turn = make_text_task(rng, split, kind, TEXT_KINDS).turn
        elif kind in ALBUM_KINDS:
            turn = ALBUM_KINDS[kind](rng, pictures)
        else:
            turn = PICTURE_KINDS[kind](rng, pictures[0])
        images = tuple(render(picture) for picture in pictures)
        prompts.append(HardPrompt(turn.question, turn.answer, kind, about, turn.facts, images))
    return prompts
