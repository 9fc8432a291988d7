"""The text and the visual data set as one data set: samples that the curriculum chooses, encoded and batched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import MSDDataError, MSDError
from .curriculum import Draw, SampleKind
from .data.encoding import collate_conversations
from .data.skipped import SkippedSamples
from .data.streamed import StreamedConversations
from .features.cache import FeatureCache, collate_features
from .rows import trained_rows


MOST_BROKEN = 1000  # samples of a stream, one after the other, after which it is given up


class Mixture(Dataset):
    """
    Returns the encoded sample that a [`Draw`] names. A broken sample is replaced by the next usable sample of its data
    set. The entry `"skipped"` of a returned sample lists the broken ones before it.

    Args:
        datasets: the `"text"` and the `"visual"` data set, each of [`Conversation`]s or a [`FeatureCache`].
        encode: a [`ConversationEncoder`], for data sets of conversations.
        strict: raise at a broken sample.

    Raises:
        MSDError: when one data set is a cache and the other one is not.
    """

    def __init__(self, datasets: dict[SampleKind, Any], encode: Callable, strict: bool = False):
        self.datasets = {kind: dataset for kind, dataset in datasets.items() if dataset is not None}
        self.encode = encode
        self._skipped = SkippedSamples(strict)
        self._seen: set[tuple[SampleKind, int]] = set()  # the samples in `_skipped`, each of which is read every epoch
        cached = {isinstance(dataset, FeatureCache) for dataset in self.datasets.values()}
        if len(cached) > 1:
            raise MSDError("One data set holds cached features and the other one conversations: give two of a kind.")
        self.is_cached = cached == {True}

    @property
    def sizes(self) -> dict[SampleKind, int | None]:
        """The number of samples of each data set; `None` for a stream."""
        return {kind: None if _is_stream(dataset) else len(dataset) for kind, dataset in self.datasets.items()}

    def __len__(self) -> int:
        sizes = [size for size in self.sizes.values() if size is not None]
        if len(sizes) < len(self.datasets):
            raise TypeError("A mixture with a stream has no length.")  # `Trainer` catches it
        return sum(sizes)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        dataset = self.datasets[draw.kind]
        skipped = []
        for index in _places(dataset, draw.place):
            try:
                sample = dataset[index]
                features = sample if self.is_cached else self.encode(sample)
            except MSDDataError as error:
                if (draw.kind, index) not in self._seen:
                    self._skipped.add(error)
                    self._seen.add((draw.kind, index))
                skipped.append((draw.kind, index, error.reason))
                continue
            return {**features, "draw": draw, "skipped": skipped}
        raise MSDError(
            f"Not one of the {len(skipped)} {draw.kind} samples can be used: "
            f"{', '.join(sorted({reason for _, _, reason in skipped}))}. `msd-hf data check` shows what is wrong."
        )


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, StreamedConversations)


def _places(dataset: Any, place: int) -> Iterable[int]:
    """The places at which a usable sample is looked for, beginning at `place`."""
    if _is_stream(dataset):
        dataset.begin_at(place)
        return range(place, place + MOST_BROKEN)
    return ((place + offset) % len(dataset) for offset in range(len(dataset)))


class MixtureCollator:
    """
    Makes batches for [`MSDTrainer`]: the batch of `collate_conversations` or `collate_features` without its
    `assistant_mask`, and

    - `labels` `[B, L]`: token ids at trained rows, -100 elsewhere,
    - `numbers` `[B]`: the number of each sample in the run,
    - `places` `[B]`: the place of each sample in its data set,
    - `is_visual` `[B]`: whether each sample is visual,
    - `skipped`: kind, index and reason of each sample that was skipped.
    """

    def __init__(self, pad_token_id: int, is_cached: bool, rows: str):
        self.pad_token_id = pad_token_id
        self.collate = collate_features if is_cached else collate_conversations
        self.rows = rows

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        draws = [sample.pop("draw") for sample in samples]
        skipped = [skip for sample in samples for skip in sample.pop("skipped")]
        batch: dict[str, Any] = self.collate(samples, self.pad_token_id)
        trained = trained_rows(batch.pop("assistant_mask"), batch["attention_mask"], self.rows)
        batch["labels"] = batch["input_ids"].masked_fill(~trained, -100)
        batch["numbers"] = torch.tensor([draw.number for draw in draws])
        batch["places"] = torch.tensor([draw.place for draw in draws])
        batch["is_visual"] = torch.tensor([draw.kind == "visual" for draw in draws])
        batch["skipped"] = skipped
        return batch


__all__ = ["Mixture", "MixtureCollator"]
