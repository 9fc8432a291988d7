"""Samples that are drawn again, the more often the worse the draft did on them when it last saw them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from .curriculum import SampleKind


HARD_EXAMPLES_NAME = "hard_examples.safetensors"


class HardExamples:
    """
    How often the draft's most likely token is the target's, for each sample. An epoch draws by the values that were
    known at its start, so that its samples depend neither on how far a data loader reads ahead nor on the number of
    processes, and are the same when a run is resumed.

    Args:
        sizes: number of samples of each kind.
    """

    def __init__(self, sizes: Mapping[SampleKind, int]):
        self.epoch = 0
        self._agreement = {kind: torch.full((size,), torch.nan, dtype=torch.float64) for kind, size in sizes.items()}
        # Rows at which the draft agreed, and all rows, of each sample, in this epoch and on this process.
        self._counts = {kind: torch.zeros(2, size, dtype=torch.long) for kind, size in sizes.items()}
        self._unread: list[torch.Tensor] = []  # on the device, so that training does not wait for them
        # Places, and the running sums of their weights.
        self._choices: dict[SampleKind, tuple[list[int], list[float]]] = {}

    def add(self, trained: torch.Tensor, agrees: torch.Tensor, places: torch.Tensor, is_visual: torch.Tensor) -> None:
        """
        Adds a batch.

        Args:
            trained (`torch.BoolTensor` of shape `[B, L]`): the R rows in the loss.
            agrees (`torch.BoolTensor` of shape `[R]`): whether the draft agreed with the target there.
            places (`torch.LongTensor` of shape `[B]`): places of the samples in their data sets.
            is_visual (`torch.BoolTensor` of shape `[B]`): whether they are of the visual data set.
        """
        agreed = torch.zeros_like(trained).masked_scatter(trained, agrees).sum(1)
        self._unread.append(torch.stack([is_visual.to(agreed), places.to(agreed), agreed, trained.sum(1)]))

    def begin_epoch(self, epoch: int, accelerator: Accelerator) -> None:
        """Takes over what was added in the epochs before this one. All processes must call it together."""
        if epoch > self.epoch:
            for kind, counts in self._reduced(accelerator).items():
                agreed, rows = counts.double()
                self._agreement[kind] = torch.where(rows > 0, agreed / rows, self._agreement[kind])
                self._counts[kind].zero_()
            self.epoch = epoch
        self._choices = {}

    def draw(self, kind: SampleKind, draws: random.Random) -> int | None:
        """Draws the place of a sample, in proportion to the share of rows at which the draft was wrong; `None` while
        nothing is known, or nothing was wrong."""
        if kind not in self._choices:
            wrong = 1 - self._agreement[kind]
            known = (wrong > 0).nonzero().squeeze(1)  # false for NaN
            self._choices[kind] = known.tolist(), list(itertools.accumulate(wrong[known].tolist()))
        places, sums = self._choices[kind]
        return draws.choices(places, cum_weights=sums)[0] if places else None

    def save(self, folder: str | Path, accelerator: Accelerator, writes: bool) -> None:
        """Writes everything into a checkpoint. All processes must call it together, and one of them `writes`."""
        counts = self._reduced(accelerator)
        if not writes:
            return
        tensors = {f"{kind}.agreement": agreement for kind, agreement in self._agreement.items()}
        tensors |= {f"{kind}.counts": part for kind, part in counts.items()}
        path = Path(folder) / HARD_EXAMPLES_NAME
        save_file({**tensors, "epoch": torch.tensor(self.epoch)}, path)
        path.chmod(0o644)  # safetensors makes files that only their owner can read

    def load(self, folder: str | Path, is_first: bool) -> None:
        """Goes on from what `save` has written, if it is there. The counts go to one process, which `is_first`."""
        path = Path(folder) / HARD_EXAMPLES_NAME
        if not path.is_file():
            return
        tensors = load_file(path)
        self.epoch = int(tensors["epoch"])
        self._unread, self._choices = [], {}
        for kind in self._agreement:
            self._agreement[kind] = tensors[f"{kind}.agreement"]
            self._counts[kind] = tensors[f"{kind}.counts"] * is_first

    def _reduced(self, accelerator: Accelerator) -> dict[SampleKind, torch.Tensor]:
        """The counts of this epoch, `[2, size]` of each kind, over all processes."""
        if self._unread:
            is_visual, places, agreed, rows = torch.cat(self._unread, dim=1).cpu()
            for kind, counts in self._counts.items():
                chosen = is_visual == (kind == "visual")
                counts.index_add_(1, places[chosen], torch.stack([agreed[chosen], rows[chosen]]))
            self._unread = []
        return {
            kind: accelerator.reduce(counts.to(accelerator.device, copy=True)).cpu()
            for kind, counts in self._counts.items()
        }


__all__ = ["HARD_EXAMPLES_NAME", "HardExamples"]
