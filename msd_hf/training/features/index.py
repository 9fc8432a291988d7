"""The index of a feature cache: its settings and its shards."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ...errors import MSDError
from ...writing.destination import check_parent
from ...writing.saving import SAFETENSORS_TEMPORARY
from ..data.encoding import ConversationEncoder
from .notes import read_notes, remove_notes
from .storage import damaged_shard, safely_replaced_file, write_shard


FORMAT_VERSION = 1
INDEX_NAME = "index.json"


# Temporary files of a killed run, as `replaced_file` and safetensors name them.
_LEFTOVER = re.compile(
    rf"\.(shard-\d{{5}}\.(safetensors|json)|index\.json)\.\d+\.tmp|{fnmatch.translate(SAFETENSORS_TEMPORARY)}"
)


def check_cache_folder(folder: Path) -> set[str]:
    """
    Checks that features can be written to `folder`, before the target is loaded. Returns the names in the folder.

    Raises:
        MSDError: when it is a file, when it cannot be read or written, or when it holds other files and no cache.
    """
    if folder.is_file():
        raise MSDError(f"{str(folder)!r} is a file; features need a folder.")
    check_parent(folder / INDEX_NAME)
    try:
        names = set(os.listdir(folder)) if folder.exists() else set()
    except OSError as error:
        raise MSDError(f"The folder {str(folder)!r} cannot be read: {error.strerror}.") from error
    if INDEX_NAME not in names and not all(map(_LEFTOVER.fullmatch, names)):
        raise MSDError(f"The folder {str(folder)!r} is not empty and holds no feature cache; choose another one.")
    return names


@dataclass
class CacheIndex:
    """
    The settings and the shards of a feature cache, as the file `index.json` of its folder holds them.

    Args:
        target, encoder, conversations: fingerprints of the target, of the encoder and of the data.
        target_dtype: dtype of the target during the extraction.
        num_conversations: number of conversations in the data.
        max_length, storage, feature_layers, all_hidden_states, samples_per_shard, max_visual_rows: arguments of
            [`extract_features`]. Shard i begins with conversation `i * samples_per_shard`.
        hidden_size: hidden size of the target.
        shards: `file`, `bytes`, `samples`, `tokens`, `ids` and `skipped` (ids by reason) of each shard.
        complete: whether all shards are written.
    """

    target: str
    encoder: str
    conversations: str
    target_dtype: str
    num_conversations: int
    max_length: int
    storage: str
    hidden_size: int
    feature_layers: list[int]
    all_hidden_states: bool
    samples_per_shard: int
    max_visual_rows: int | None = None
    shards: list[dict] = field(default_factory=list)
    complete: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """sha256 of the whole index."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete cache."""
        return -(-self.num_conversations // self.samples_per_shard)

    @property
    def num_samples(self) -> int:
        return sum(shard["samples"] for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    @property
    def skipped(self) -> Counter[str]:
        """Number of skipped samples by reason."""
        return Counter(reason for shard in self.shards for reason, ids in shard["skipped"].items() for _ in ids)

    def skipped_table(self) -> str:
        """The number of skipped samples by reason, as text."""
        return ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.most_common())

    def check_shard(self, folder: Path, shard_id: int) -> None:
        """
        Checks that the file of a shard exists and has its size. The file is not read.

        Raises:
            MSDError: when the file is missing or has another size.
        """
        _check_file(folder, self.shards[shard_id])

    def missing_shards(self, folder: Path) -> list[int]:
        """The numbers of the shards that are to be written: neither the index nor a note has them, or their file is
        damaged."""
        known = {**dict(enumerate(self.shards)), **read_notes(folder)}
        return [shard_id for shard_id in range(self.num_shards) if not _has_file(folder, known.get(shard_id))]

    def add_shard(self, folder: Path, shard_id: int, entry: dict[str, Any]) -> None:
        """Takes over the entry of the next shard, or of one that replaces a damaged one, and the notes that follow on
        it; then writes the index."""
        self.shards[shard_id : shard_id + 1] = [entry]
        if not self.take_notes(folder):
            self.write(folder)

    def take_notes(self, folder: Path) -> bool:
        """Takes over the notes in a folder that leave no gap, and writes the index then. Returns whether it did."""
        taken = []
        for shard_id, entry in sorted(read_notes(folder).items()):
            if shard_id > len(self.shards) or shard_id >= self.num_shards:
                break
            self.shards[shard_id : shard_id + 1] = [entry]
            taken.append(shard_id)
        self.complete = len(self.shards) == self.num_shards
        if taken:
            self.write(folder)
            remove_notes(folder, taken)
        return bool(taken)

    def continued(self, folder: Path, processor: Any) -> CacheIndex:
        """
        The index of an earlier extraction to `folder` with the same settings, or this index if there was none. Removes
        the temporary files of a killed run, and takes over its notes.

        Raises:
            MSDError: when the folder holds other files, or a cache made with other settings.
        """
        names = check_cache_folder(folder)
        for name in filter(_LEFTOVER.fullmatch, names):
            (folder / name).unlink(missing_ok=True)
        earlier = CacheIndex.read(folder) if INDEX_NAME in names else self
        if not earlier.shards and not read_notes(folder):
            return self
        terms = ("conversations", "max_length", "storage", "feature_layers", "all_hidden_states", "samples_per_shard")
        expected = {name: getattr(self, name) for name in (*terms, "max_visual_rows", "target_dtype")}
        earlier.check_terms(folder, self.target, processor, expected)
        earlier.take_notes(folder)
        return earlier

    def check_terms(self, folder: Path, target: str, processor: Any, expected: dict[str, Any]) -> None:
        """
        Compares the settings of the cache with those of the caller.

        Args:
            target: fingerprint of the caller's target.
            processor: the caller's processor.
            expected: expected values of other fields of the index.

        Raises:
            MSDError: when settings differ; the message names them.
        """
        differences = []
        if self.target != target:
            differences.append("another target")
        # The fingerprint of an encoder includes `max_length`. That is compared below, so the caller's encoder gets
        # the cache's `max_length` here.
        if self.encoder != ConversationEncoder(processor, self.max_length).fingerprint:
            differences.append("another processor")
        for name, value in expected.items():
            found = getattr(self, name)
            if found != value:
                is_data = name == "conversations"
                differences.append("other conversations" if is_data else f"`{name}` {found!r} instead of {value!r}")
        if differences:
            raise MSDError(
                f"The feature cache in {str(folder)!r} was made with {', '.join(differences)}. Extract the features "
                "to another folder, or delete this one."
            )

    def write(self, folder: Path) -> None:
        with safely_replaced_file(folder / INDEX_NAME) as temporary:
            temporary.write_text(json.dumps(self._content(), separators=(",", ":")) + "\n", encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        """The fields. A cache without a budget of visual rows does not name one, as before there were budgets."""
        content = asdict(self)
        if self.max_visual_rows is None:
            del content["max_visual_rows"]
        return content

    @classmethod
    def read(cls, folder: Path) -> CacheIndex:
        """
        Reads the index of a cache.

        Raises:
            MSDError: when there is no index, or it is damaged or of another version.
        """
        path = folder / INDEX_NAME
        if not path.is_file():
            raise MSDError(f"There is no feature cache in {str(folder)!r}: it has no {INDEX_NAME}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise MSDError(f"{str(path)!r} is not the index of a feature cache, or is damaged.") from error
        if version != FORMAT_VERSION or {*content, "max_visual_rows"} != {item.name for item in fields(cls)}:
            raise MSDError(
                f"The feature cache in {str(folder)!r} has format version {version}, this release of msd_hf reads "
                f"{FORMAT_VERSION}. Extract the features again."
            )
        return cls(**content)


def store_shard(
    folder: Path,
    shard_id: int,
    samples: list[dict[str, torch.Tensor]],
    ids: list[str],
    skipped: dict[str, list[str]],
) -> dict[str, Any]:
    """Writes the file of a shard, and returns its entry of the index."""
    path = folder / f"shard-{shard_id:05d}.safetensors"
    if samples:
        write_shard(path, samples)
    return {
        "file": path.name,
        "bytes": path.stat().st_size if samples else 0,
        "samples": len(samples),
        "tokens": sum(len(sample["input_ids"]) for sample in samples),
        "ids": ids,
        "skipped": skipped,
    }


def _check_file(folder: Path, entry: dict[str, Any]) -> None:
    if not entry["samples"]:
        return
    path = folder / entry["file"]
    if not path.is_file():
        raise damaged_shard(path, "there is no such file")
    if path.stat().st_size != entry["bytes"]:
        raise damaged_shard(path, f"it has {path.stat().st_size} bytes instead of {entry['bytes']}")


def _has_file(folder: Path, entry: dict[str, Any] | None) -> bool:
    try:
        if entry is not None:
            _check_file(folder, entry)
    except MSDError:
        return False
    return entry is not None


__all__ = ["INDEX_NAME", "CacheIndex", "check_cache_folder", "store_shard"]
