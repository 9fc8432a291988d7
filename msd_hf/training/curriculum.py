"""The order of training samples: text first, then a rising share of visual samples (paper section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch.utils.data import Sampler

from ..errors import MSDError


SampleKind = Literal["text", "visual"]
SAMPLE_KINDS: tuple[SampleKind, ...] = get_args(SampleKind)
CURRICULA = ("two-stage", "mixed", *SAMPLE_KINDS)


@dataclass(frozen=True)
class Curriculum:
    """
    The share of visual samples over a training run.

    Args:
        kind (`str`, defaults to `"two-stage"`): `"two-stage"` is the paper's; `"mixed"` has the same share from the
            start to the end; `"text"` and `"visual"` have one kind only.
        num_stages (`int`, defaults to 40): number of equal parts of the run. The share is constant in each part. In
            the paper each of the 40 epochs is a stage.
        text_fraction (`float`, defaults to 0.5): fraction of the run, from its start, that is text only.
        final_share (`float`, defaults to 1.0): share of visual samples in the last stage. The share rises linearly to
            this value.
        mixed_share (`float`, defaults to 0.5): share of visual samples when `kind` is `"mixed"`.

    Raises:
        MSDError: when a value is out of range.
    """

    kind: str = "two-stage"
    num_stages: int = 40
    text_fraction: float = 0.5
    final_share: float = 1.0
    mixed_share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in CURRICULA:
            raise MSDError(f"Unknown curriculum {self.kind!r}: choose one of {', '.join(CURRICULA)}.")
        if self.num_stages < 1:
            raise MSDError(f"A curriculum needs at least one stage, got {self.num_stages}.")
        for name in ("text_fraction", "final_share", "mixed_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise MSDError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")

    def needs(self, kind: SampleKind) -> bool:
        """Whether the curriculum draws samples of a kind."""
        return self.kind not in SAMPLE_KINDS or self.kind == kind

    def share(self, stage: int) -> float:
        """Probability that a sample of a stage is visual. Stages are counted from 0."""
        if self.kind != "two-stage":
            return {"mixed": self.mixed_share, "text": 0.0, "visual": 1.0}[self.kind]
        num_text_stages = int(self.num_stages * self.text_fraction)
        # The first stage is text only even if `text_fraction` of all stages is less than one stage.
        if stage < num_text_stages or (stage == 0 and self.text_fraction > 0):
            return 0.0
        rise = (stage + 1 - num_text_stages) / (self.num_stages * (1 - self.text_fraction))
        return min(1.0, rise) * self.final_share


def other_kind(kind: SampleKind) -> SampleKind:
    """The kind of sample that `kind` is not."""
    return "visual" if kind == "text" else "text"


class Draw(NamedTuple):
    """Names one training sample: its number in the run, its data set, and its index in the data set (`place`)."""

    number: int
    kind: SampleKind
    place: int


class CurriculumSampler(Sampler[Draw]):
    """
    Chooses the samples of a run. Each choice depends only on the seed and on the number of the sample in the run.
    Therefore the samples are the same for any number of data loader workers and processes, and when a run is resumed.

    Each pass over a data set has its own random order.

    Args:
        num_text, num_visual: sizes of the data sets; `None` for a stream. Its samples are drawn in their order, and
            `place` counts them over all passes.
        curriculum: gives the share of visual samples.
        epoch_length: number of samples in an epoch.
        num_samples: number of samples in the whole run, over which the stages are spread.
        seed: seed of the random choices.
        hard_example_mixing: share of the samples that `draw_hard` chooses.
        draw_hard: chooses the place of a sample of a kind that went badly; `None` while there is none. It must give
            the same place for the same random numbers throughout an epoch.

    Raises:
        MSDError: when the curriculum needs a kind of sample and its data set is empty.
    """

    def __init__(
        self,
        num_text: int | None,
        num_visual: int | None,
        curriculum: Curriculum,
        epoch_length: int,
        num_samples: int,
        seed: int = 0,
        hard_example_mixing: float = 0.0,
        draw_hard: Callable[[SampleKind, random.Random], int | None] | None = None,
    ):
        self.sizes: dict[SampleKind, int | None] = {"text": num_text, "visual": num_visual}
        for kind, size in self.sizes.items():
            if size == 0 and curriculum.needs(kind):
                raise MSDError(
                    f"The curriculum {curriculum.kind!r} needs {kind} samples and there are none: give a {kind} data "
                    f"set, or choose the curriculum {other_kind(kind)!r}."
                )
        self.curriculum = curriculum
        self.epoch_length = epoch_length
        self.num_samples = num_samples
        self.seed = seed
        self.hard_example_mixing = hard_example_mixing
        self.draw_hard = draw_hard
        self.epoch = 0
        self._orders: dict[SampleKind, tuple[int, list[int]]] = {}
        self._counted, self._counts = 0, dict.fromkeys(SAMPLE_KINDS, 0)  # draws of each kind before number `_counted`

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch, counted from 0, of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch_length

    def __iter__(self) -> Iterator[Draw]:
        start = self.epoch * self.epoch_length
        for number in range(start, start + self.epoch_length):
            yield self.draw(number)

    def stage(self, number: int) -> int:
        """The stage of the curriculum in which sample `number` of the run lies."""
        num_stages = self.curriculum.num_stages
        return min(num_stages - 1, number * num_stages // max(1, self.num_samples))

    def draw(self, number: int) -> Draw:
        """Chooses sample `number` of the run."""
        kind = self._kind(number)
        size = self.sizes[kind]
        if size is None:
            return Draw(number, kind, self._num_before(number, kind))
        if self.draw_hard is not None:
            draws = random.Random(f"hard examples/{self.seed}/{number}")
            place = self.draw_hard(kind, draws) if draws.random() < self.hard_example_mixing else None
            if place is not None:
                return Draw(number, kind, place)
        turn, position = divmod(number, size)
        if self._orders.get(kind, (None,))[0] != turn:
            order = list(range(size))
            random.Random(f"{self.seed}/{kind}/{turn}").shuffle(order)
            self._orders[kind] = (turn, order)
        return Draw(number, kind, self._orders[kind][1][position])

    def _kind(self, number: int) -> SampleKind:
        share = self.curriculum.share(self.stage(number))
        return "visual" if random.Random(f"{self.seed}/{number}").random() < share else "text"

    def _num_before(self, number: int, kind: SampleKind) -> int:
        """How many samples of a kind come before sample `number` of the run."""
        if number < self._counted:
            self._counted, self._counts = 0, dict.fromkeys(SAMPLE_KINDS, 0)
        for earlier in range(self._counted, number):
            self._counts[self._kind(earlier)] += 1
        self._counted = number
        return self._counts[kind]


__all__ = ["CURRICULA", "SAMPLE_KINDS", "Curriculum", "CurriculumSampler", "Draw", "SampleKind", "other_kind"]
