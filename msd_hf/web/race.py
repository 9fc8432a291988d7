"""A race of the target alone against the target with its draft."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL.Image import Image
from transformers import PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..prompts import build_inputs
from .recorder import record
from .recording import Recording


Stage = Literal["ready", "alone", "drafted", "race", "done"]
_LIVE_INTERVAL = 0.2  # seconds; each frame takes a little time from the call that it shows
_REPLAY_INTERVAL = 0.1
_SHORTEST_REPLAY = 5.0  # seconds; faster answers are replayed in slow motion


@dataclass(frozen=True)
class RacePair:
    """
    A target with its draft, and how they answer.

    Args:
        target, draft, processor: loaded, on the same device.
        names (`tuple[str, str]`): of target and draft, for the reader.
        arguments (`Mapping[str, Any]`): of `generate`.
        seed (`int`): of sampling.
    """

    target: PreTrainedModel
    draft: MSDDraftModel
    processor: Any
    names: tuple[str, str]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Frame:
    """
    What the page shows at one moment.

    Args:
        stage: `"alone"` and `"drafted"` while a side answers, `"race"` while both are replayed, `"done"`; `"ready"`
            before all.
        alone, drafted (`Recording`): the two sides at this moment.
        length (`int`): tokens of the longer answer, as far as it is known.
        slowdown (`int`): how much slower than the clocks the replay runs.
    """

    stage: Stage = "ready"
    alone: Recording = field(default_factory=Recording)
    drafted: Recording = field(default_factory=Recording)
    length: int = 0
    slowdown: int = 1

    @property
    def speedup(self) -> float:
        """The seconds of the target alone, divided by those with the draft. Both sides must be done."""
        return self.alone.seconds / self.drafted.seconds

    @property
    def is_same(self) -> bool:
        """Whether both sides have the same tokens."""
        return self.alone.tokens == self.drafted.tokens


def race(pair: RacePair, question: str, image: Image | None = None) -> Iterator[Frame]:
    """
    Answers a question without and then with the draft, each alone on the machine, and replays both at once.

    Args:
        pair (`RacePair`): who answers.
        question, image: what [`build_inputs`] takes.

    Yields:
        `Frame`: several a second. The last one is `"done"`.
    """
    frame = Frame()
    for frame in answers(pair, question, image):
        yield frame
    length = max(len(frame.alone.tokens), len(frame.drafted.tokens))
    yield from _replay(frame.alone, frame.drafted, length)
    yield Frame("done", frame.alone, frame.drafted, length)


def answers(pair: RacePair, question: str, image: Image | None = None) -> Iterator[Frame]:
    """The first part of [`race`]: both answers as they come, without the replay."""
    inputs = build_inputs(pair.processor, question, image).to(pair.target.device, dtype=pair.target.dtype)
    tokenizer = getattr(pair.processor, "tokenizer", pair.processor)

    def answer(**arguments: Any) -> Iterator[Recording]:
        return record(pair.target, tokenizer, inputs, _LIVE_INTERVAL, pair.seed, **pair.arguments, **arguments)

    alone = Recording()
    for alone in answer():
        yield Frame("alone", alone, length=len(alone.tokens))
    for drafted in answer(assistant_model=pair.draft):
        yield Frame("drafted", alone, drafted, len(alone.tokens))


def _replay(alone: Recording, drafted: Recording, length: int) -> Iterator[Frame]:
    """Shows both recordings by one clock, in real time or in slow motion."""
    end = max(alone.seconds, drafted.seconds)
    slowdown = max(1, round(_SHORTEST_REPLAY / end))
    started = time.perf_counter()
    while (now := (time.perf_counter() - started) / slowdown) < end:
        yield Frame("race", alone.until(now), drafted.until(now), length, slowdown)
        time.sleep(_REPLAY_INTERVAL)


__all__ = ["Frame", "RacePair", "answers", "race"]
