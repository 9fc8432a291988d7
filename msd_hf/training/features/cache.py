"""The feature cache: features of a target, extracted once and read in every epoch of a draft's training."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ...errors import MSDDataError, MSDError
from ...processes.group import ALONE, Processes
from ...target.adapter import TargetAdapter
from ..data.conversations import Conversations
from ..data.encoding import ConversationEncoder
from ..data.skipped import SkippedSamples
from ..interruption import resumable
from .disk_estimate import DiskEstimate, check_disk, estimate_disk
from .extraction import FeatureExtractor, iterate_encoded
from .fingerprint import target_fingerprint
from .index import CacheIndex, store_shard
from .notes import write_note
from .storage import ShardReader, resolve_storage, stored_rows


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExtractionReport:
    """
    The size of a feature cache after its extraction, and the samples that were skipped.

    Args:
        num_samples, num_tokens, num_bytes: totals of the whole cache.
        skipped: number of samples that could not be used, by reason.
        estimate: the estimate from before the extraction; `None` if the cache was complete already.
    """

    num_samples: int
    num_tokens: int
    num_bytes: int
    skipped: dict[str, int]
    estimate: DiskEstimate | None


def extract_features(
    target: PreTrainedModel,
    processor: Any,
    conversations: Conversations,
    folder: str | Path,
    *,
    max_length: int = 2048,
    storage: str = "auto",
    batch_size: int = 8,
    feature_layers: Sequence[int] | None = None,
    all_hidden_states: bool = False,
    max_visual_rows: int | None = None,
    strict: bool = False,
    samples_per_shard: int = 128,
    num_workers: int = 0,
    processes: Processes = ALONE,
) -> ExtractionReport:
    """
    Runs the target over conversations and writes the training features to a folder, for [`FeatureCache`].

    If the extraction is interrupted, the same call resumes with the first incomplete shard and writes the same bits.
    On a complete cache it does nothing.

    Args:
        target: the frozen target, in any dtype, on any device, quantised or not.
        processor: the target's processor.
        conversations: the data, opened by [`load_conversations`].
        folder: the folder of this cache, without other files. It is created if needed.
        max_length: number of tokens to which longer samples are cut, expanded images included.
        storage: `"auto"` (the target's dtype), `"float32"`, `"bfloat16"`, `"float16"`, or `"int8"` with a scale for
            each row.
        batch_size: samples per forward of the target.
        feature_layers (*optional*): decoder layers, counted from 0, whose outputs are kept besides the last hidden
            state.
        all_hidden_states: also keep hidden states that only a draft with `decouple_visual_tokens=False` reads.
        max_visual_rows (*optional*): keep only this many visual rows of a sample, evenly spaced, which are the rows
            that a draft with this budget reads. The training then needs a `max_visual_rows` of at most this number.
        strict: raise the error of the first broken sample instead of skipping and counting broken samples.
        samples_per_shard: conversations per file. Their features stay in memory until the file is written, and are
            lost if the run is killed before.
        num_workers: processes that read images and tokenize ahead of the target.
        processes: the processes that share the extraction, [`~msd_hf.processes.group.launched`]. All of them make this
            call, with a folder that all machines see. The cache is the one that a single process writes.

    Raises:
        MSDError: when the folder holds other files or a cache made with other settings, when the disk is too small, or
            when no sample can be used.
        MSDDataError: with `strict`, when a sample is broken.
    """
    if batch_size < 1 or samples_per_shard < 1:
        raise MSDError(f"`batch_size` {batch_size} and `samples_per_shard` {samples_per_shard} must be at least 1.")
    if max_visual_rows is not None and max_visual_rows < 1:
        raise MSDError(f"`max_visual_rows` must be at least 1, or None for all, got {max_visual_rows}.")
    folder = Path(folder)
    encoder = ConversationEncoder(processor, max_length)
    adapter = TargetAdapter(target, feature_layers=feature_layers)
    settings = CacheIndex(
        target=target_fingerprint(target),
        target_dtype=str(target.dtype).removeprefix("torch."),
        encoder=encoder.fingerprint,
        conversations=conversations.fingerprint,
        num_conversations=len(conversations),
        max_length=max_length,
        storage=resolve_storage(storage, target.dtype),
        hidden_size=target.config.get_text_config(decoder=True).hidden_size,
        feature_layers=list(adapter.reads.layers),
        all_hidden_states=all_hidden_states,
        samples_per_shard=samples_per_shard,
        max_visual_rows=max_visual_rows,
    )
    processes.check_equal({**asdict(settings), "batch_size": batch_size})

    def begin() -> tuple[CacheIndex, list[int], DiskEstimate | None]:
        index = settings.continued(folder, processor)
        if strict and index.skipped:
            raise MSDError(
                f"An earlier run, without `strict`, skipped samples of the feature cache in {str(folder)!r} "
                f"({index.skipped_table()}). Delete the folder, or extract without `strict`."
            )
        missing = index.missing_shards(folder)
        if not missing:
            return index, missing, None
        estimate = estimate_disk(
            target,
            processor,
            conversations,
            max_length=max_length,
            storage=storage,
            feature_layers=feature_layers,
            all_hidden_states=all_hidden_states,
            max_visual_rows=max_visual_rows,
        )
        logger.info(f"The features in {str(folder)!r} take {estimate}.")
        check_disk(folder, estimate.num_bytes * len(missing) // index.num_shards)
        folder.mkdir(parents=True, exist_ok=True)
        index.write(folder)
        return index, missing, estimate

    index, missing, estimate = processes.from_first(begin)
    if missing:
        tokenizer = getattr(processor, "tokenizer", processor)
        pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0
        extractor = FeatureExtractor(
            adapter, pad_token_id, index.storage, all_hidden_states, batch_size, max_visual_rows
        )
        training = target.training
        try:
            target.eval()
            with resumable(lambda: _place(folder, index)):
                _write_shards(
                    folder, index, missing, extractor, conversations, encoder, strict, num_workers, processes
                )
                processes.gather(None)  # waits for the others
        finally:
            target.train(training)
        index = processes.from_first(lambda: _joined(folder, index))
    if not index.num_samples:
        raise MSDError(f"None of {len(conversations):,} samples can be used ({index.skipped_table() or 'no data'}).")
    if index.skipped and processes.is_first:
        logger.warning(
            f"{index.skipped.total():,} of {len(conversations):,} samples skipped: {index.skipped_table()}."
        )
    return ExtractionReport(index.num_samples, index.num_tokens, index.num_bytes, dict(index.skipped), estimate)


def _place(folder: Path, index: CacheIndex) -> str:
    kept = index.num_shards - len(index.missing_shards(folder))
    return f"{kept:,} of {index.num_shards:,} shards are kept in {str(folder)!r}, and the same call goes on there."


def _joined(folder: Path, index: CacheIndex) -> CacheIndex:
    """The complete index, with the shards of all processes."""
    index.take_notes(folder)
    missing = index.missing_shards(folder)
    if missing:
        raise MSDError(
            f"Shard {missing[0]} was written, but is not in {str(folder)!r}: all machines need the same folder."
        )
    return index


def _write_shards(
    folder: Path,
    index: CacheIndex,
    missing: list[int],
    extractor: FeatureExtractor,
    conversations: Conversations,
    encoder: ConversationEncoder,
    strict: bool,
    num_workers: int,
    processes: Processes,
) -> None:
    """Writes this process's share of the missing shards."""
    size, total = index.samples_per_shard, index.num_conversations
    places = {
        shard_id: range(shard_id * size, min((shard_id + 1) * size, total)) for shard_id in processes.share(missing)
    }
    order = list(chain.from_iterable(places.values()))
    encoded = iterate_encoded(conversations, encoder, order, num_workers)
    all_skipped = SkippedSamples(strict)
    total = total if processes.is_alone else len(order)
    bar = {"desc": "features", "unit": "sample", "disable": not processes.is_first}
    with tqdm(total=total, initial=total - len(order), **bar) as progress:
        for shard_id, place in places.items():
            samples: list[dict[str, torch.Tensor]] = []
            ids: list[str] = []
            skipped: dict[str, list[str]] = {}
            for sample_id, result in extractor(islice(encoded, len(place))):
                progress.update()
                if isinstance(result, MSDDataError):
                    all_skipped.add(result)
                    skipped.setdefault(result.reason, []).append(sample_id)
                else:
                    samples.append(result)
                    ids.append(sample_id)
            entry = store_shard(folder, shard_id, samples, ids, skipped)
            if processes.is_alone:
                index.add_shard(folder, shard_id, entry)
            else:
                write_note(folder, shard_id, entry)


class FeatureCache(Dataset):
    """
    The samples of a complete cache folder, in the order of the data, without the skipped ones.

    Opening a cache reads only its index. Each sample is read from disk when it is indexed, so that a cache may be much
    larger than memory. A cache can be used by the workers of a `DataLoader`.

    Args:
        folder: the folder that [`extract_features`] wrote.

    Raises:
        MSDError: when the folder holds no cache, or the cache is incomplete or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = CacheIndex.read(self.folder)
        if not self.index.complete:
            kept = self.index.num_shards - len(self.index.missing_shards(self.folder))
            raise MSDError(
                f"The feature cache in {str(folder)!r} is not complete: {kept} of "
                f"{self.index.num_shards} shards. Run the same extraction again: it resumes there."
            )
        for shard_id in range(self.index.num_shards):
            self.index.check_shard(self.folder, shard_id)
        self._ends = list(accumulate(shard["samples"] for shard in self.index.shards))
        self._readers: dict[int, ShardReader] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Reads one sample of L tokens, with embeddings of V visual positions. W is (1 + number of feature layers) times
        the hidden size H.

        Returns:
            `input_ids` (`LongTensor` of shape `[L]`), `assistant_mask` and `visual_mask` (`BoolTensor` of shape
            `[L]`), `visual_embeds` (`[V, H]`), and `hidden_states` (`[L, W]`), which are zero at rows that are not
            stored. `visual_embeds` and `hidden_states` have the dtype in which they are stored; int8 becomes float32.
            A cache with `max_visual_rows` also has `kept_visual` (`BoolTensor` of shape `[L]`), true at the V visual
            positions; without it these are all of `visual_mask`.
        """
        index = range(len(self))[index]
        shard = bisect_right(self._ends, index)
        start = self._ends[shard] - self.index.shards[shard]["samples"]
        sample = self._reader(shard).read(index - start, self.index.hidden_size)
        kept: dict[str, torch.Tensor] = {}
        if "visual_places" in sample:
            places = sample["visual_places"].long()
            kept["kept_visual"] = torch.zeros_like(sample["visual_mask"]).index_fill_(0, places, True)
        stored = stored_rows(sample["assistant_mask"], sample["visual_mask"], self.index.all_hidden_states, **kept)
        rows = sample["hidden_states"]
        return {
            **kept,
            "input_ids": sample["input_ids"].long(),
            "assistant_mask": sample["assistant_mask"].clone(),  # the tensor that was read lies in the mapped file
            "visual_mask": sample["visual_mask"].clone(),
            "visual_embeds": sample["visual_embeds"].clone(),
            "hidden_states": rows.new_zeros(len(stored), rows.shape[-1]).masked_scatter(stored.unsqueeze(-1), rows),
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings and of the list of samples. It does not depend on the folder."""
        return self.index.fingerprint

    @property
    def ids(self) -> list[str]:
        """The id of each sample."""
        return [sample_id for shard in self.index.shards for sample_id in shard["ids"]]

    def check(
        self,
        target: PreTrainedModel,
        processor: Any,
        max_length: int,
        feature_layers: Sequence[int] | None = None,
        needs_all_hidden_states: bool = False,
        max_visual_rows: int | None = None,
    ) -> None:
        """
        Checks that the cache was made with this target, this processor and these settings.

        Args:
            target, processor, max_length, feature_layers: the arguments that [`extract_features`] must have had.
            needs_all_hidden_states: whether the draft also reads the hidden states before visual positions.
            max_visual_rows (*optional*): the most visual rows of a sample that training reads; `None`: all.

        Raises:
            MSDError: when the cache was made in another way; the message names the differences.
        """
        self.check_visual_rows(max_visual_rows)
        expected = {"max_length": max_length, "feature_layers": sorted(feature_layers or ())}
        if needs_all_hidden_states:
            expected["all_hidden_states"] = True
        self.index.check_terms(self.folder, target_fingerprint(target), processor, expected)

    def check_visual_rows(self, needed: int | None) -> None:
        """
        Checks that the cache holds the visual rows that training reads.

        Args:
            needed: the most visual rows of a sample; `None`: all.

        Raises:
            MSDError: when it was extracted with fewer.
        """
        kept = self.index.max_visual_rows
        if kept is not None and (needed is None or needed > kept):
            raise MSDError(
                f"The feature cache in {str(self.folder)!r} holds at most {kept} visual rows of a sample, and this "
                f"training reads {'all' if needed is None else needed}: set `max_visual_rows` to {kept} or less, or "
                "extract the features again with more."
            )

    def _reader(self, shard: int) -> ShardReader:
        if self._process != os.getpid():  # a forked process opens the files itself
            self._readers, self._process = {}, os.getpid()
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self.folder / self.index.shards[shard]["file"])
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


def collate_features(samples: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Makes a right-padded batch of samples of a [`FeatureCache`].

    Returns:
        `input_ids` and `attention_mask` (`LongTensor` of shape `[B, L]`), `assistant_mask` and `visual_mask`
        (`BoolTensor` of shape `[B, L]`), `hidden_states` (`[B, L, W]`), and `visual_embeds` (`[V, H]`), the visual
        rows of all samples in the row-major order of `visual_mask`. If a sample comes from a cache with
        `max_visual_rows`, also `kept_visual` (`BoolTensor` of shape `[B, L]`), whose order they then have.
    """
    padding = {"input_ids": pad_token_id, "assistant_mask": False, "visual_mask": False, "hidden_states": 0.0}
    if any("kept_visual" in sample for sample in samples):
        samples = [{"kept_visual": sample["visual_mask"], **sample} for sample in samples]
        padding["kept_visual"] = False
    batch = {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths.unsqueeze(1)).long()
    batch["visual_embeds"] = torch.cat([sample["visual_embeds"] for sample in samples])
    return batch


__all__ = ["ExtractionReport", "FeatureCache", "collate_features", "estimate_disk", "extract_features"]
