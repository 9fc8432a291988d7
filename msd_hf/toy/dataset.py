"""Makes the conversations of a split, in memory or as a LLaVA-style JSON file with a folder of pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..writing.saving import replace_text, replaced_file
from .text_questions import TEXT_KINDS, make_text_task, make_text_turns
from .turns import Turn
from .visual_questions import VISUAL_KINDS, make_visual_turns
from .world import Scene, check_split, make_scene, render


SampleKind = Literal["text", "visual"]
IMAGE_TAG = "<image>"
_NUM_TURNS = {"visual": (2, 4), "text": (1, 3)}
_VISUAL_SHARE = 0.6


@dataclass(frozen=True)
class Prompt:
    """A single held-out question. `image` is a 144x144 RGB picture, or `None` for a text question. `answer` is the
    reference, and `facts` are the strings that a correct answer contains."""

    question: str
    answer: str
    kind: str
    facts: tuple[str, ...]
    image: Image.Image | None = None

    @property
    def sample_kind(self) -> SampleKind:
        """`"visual"` if the question is about a picture, else `"text"`."""
        return "text" if self.image is None else "visual"

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The image, or nothing."""
        return () if self.image is None else (self.image,)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat for `processor.apply_chat_template`. The processor gets the image separately."""
        parts: list[dict[str, str]] = [{"type": "image"}] if self.image is not None else []
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


def _to_sample(name: str, turns: list[Turn], scene: Scene | None) -> dict[str, Any]:
    conversations = []
    for index, turn in enumerate(turns):
        tag = f"{IMAGE_TAG}\n" if scene is not None and index == 0 else ""
        conversations.append({"from": "human", "value": tag + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
    sample: dict[str, Any] = {"id": name}
    if scene is not None:
        sample |= {"image": f"images/{name}.png", "scene": scene}
    return sample | {
        "conversations": conversations,
        "kinds": [turn.kind for turn in turns],
        "facts": [list(turn.facts) for turn in turns],
    }


def make_sample(split: str, index: int, seed: int, kind: SampleKind) -> dict[str, Any]:
    """Makes sample `index` of the endless stream that `split`, `seed` and `kind` determine.

    The sample is a LLaVA entry with `id` and `conversations`, and for each turn the kind of question (`kinds`) and the
    required strings (`facts`). A visual sample also has `image` (a relative path) and `scene` (for `render`).
    """
    check_split(split)
    if kind not in _NUM_TURNS:
        raise ValueError(f"Unknown kind of sample {kind!r}: choose 'text' or 'visual'.")
    rng = random.Random(f"{split}/{kind}/{seed}/{index}")
    num_turns = rng.randint(*_NUM_TURNS[kind])
    name = f"{split}-{kind}-{seed}-{index:06d}"
    if kind == "text":
        return _to_sample(name, make_text_turns(rng, split, num_turns), None)
    scene = make_scene(rng, split)
    return _to_sample(name, make_visual_turns(rng, scene, num_turns), scene)


def make_samples(split: str, num_samples: int, seed: int, kind: SampleKind) -> list[dict[str, Any]]:
    """Makes the first `num_samples` conversations of a split, each in the form of `make_sample`."""
    return [make_sample(split, index, seed, kind) for index in range(num_samples)]


def iterate_samples(split: str, seed: int, visual_share: float = _VISUAL_SHARE) -> Iterator[dict[str, Any]]:
    """Yields an endless mix of text and visual conversations, with a share of `visual_share` visual ones."""
    rng = random.Random(f"{split}/mix/{seed}")
    counters: dict[SampleKind, int] = {"text": 0, "visual": 0}
    while True:
        kind: SampleKind = "visual" if rng.random() < visual_share else "text"
        yield make_sample(split, counters[kind], seed, kind)
        counters[kind] += 1


def make_prompts(split: str, num_prompts: int, seed: int, kind: str) -> list[Prompt]:
    """Makes `num_prompts` different questions of one kind, a key of `VISUAL_KINDS` or `TEXT_KINDS`."""
    check_split(split)
    if kind not in VISUAL_KINDS and kind not in TEXT_KINDS:
        raise ValueError(f"Unknown question kind {kind!r}: choose one of {', '.join([*VISUAL_KINDS, *TEXT_KINDS])}.")
    rng = random.Random(f"{split}/prompts/{seed}/{kind}")
    prompts: dict[str, Prompt] = {}
    for _ in range(100 * num_prompts):
        if len(prompts) == num_prompts:
            break
        image, key = None, ""
        if kind in VISUAL_KINDS:
            scene = make_scene(rng, split)
            turn, image, key = VISUAL_KINDS[kind](rng, scene), render(scene), scene.key
        else:
            turn = make_text_task(rng, split, kind).turn
        prompts.setdefault(key + turn.question, Prompt(turn.question, turn.answer, turn.kind, turn.facts, image))
    if len(prompts) < num_prompts:
        raise ValueError(f"The {split} split has fewer than {num_prompts} different questions of kind {kind!r}.")
    return list(prompts.values())


def write_dataset(folder: str | Path, split: str, num_samples: int, seed: int) -> Path:
    """Writes `{split}.json` and `images/*.png` (144x144) to `folder`; returns the path of the JSON file."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for sample in islice(iterate_samples(split, seed), num_samples):
        scene = sample.pop("scene", None)
        if scene is not None:
            path = folder / sample["image"]
            with replaced_file(path) as temporary:
                render(scene).save(temporary, format="PNG")
        entries.append(sample)
    target = folder / f"{split}.json"
    replace_text(target, json.dumps(entries, indent=1))
    return target


class ToySamples(Sequence[dict[str, Any]]):
    """The first `num_samples` conversations of a split as data for `load_conversations`. Pictures are drawn when a
    sample is indexed."""

    def __init__(self, split: str, num_samples: int, seed: int, kind: SampleKind):
        self.samples = make_samples(split, num_samples, seed, kind)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        sample = dict(self.samples[index])
        scene = sample.pop("scene", None)
        return sample if scene is None else {**sample, "image": render(scene)}
