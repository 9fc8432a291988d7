"""Storage of features on disk: number formats and safetensors shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import MSDError
from ...writing.saving import replaced_file


_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
STORAGES = ("auto", *_DTYPES)
_SCALE_BYTES = 4
_TOKEN_BYTES = 4 + 1 + 1  # bytes of an id and two masks
# Each field of a shard concatenates the rows of all its samples. The offsets say where the rows of a sample begin.
_OFFSETS = {
    "input_ids": "token_offsets",
    "assistant_mask": "token_offsets",
    "visual_mask": "token_offsets",
    "visual_embeds": "visual_offsets",
    "visual_scales": "visual_offsets",
    "visual_places": "visual_offsets",
    "hidden_states": "hidden_offsets",
    "hidden_scales": "hidden_offsets",
}


def resolve_storage(storage: str, dtype: torch.dtype) -> str:
    """
    The number format of a cache: `storage` itself, or the format of the target's `dtype` if `storage` is `"auto"`.

    Raises:
        MSDError: when there is no such format.
    """
    if storage not in STORAGES:
        raise MSDError(f"`storage` {storage!r} is not known; choose one of {', '.join(STORAGES)}.")
    if storage != "auto":
        return storage
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise MSDError(
            f"The target's dtype {name} is not a format of a feature cache: set `storage` to another format."
        )
    return name


def stored_rows(
    assistant_mask: torch.Tensor,
    visual_mask: torch.Tensor,
    all_hidden_states: bool,
    kept_visual: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The mask `[L]` of the positions whose hidden states a draft needs. These are the positions before a text token,
    whose hidden state is fused with that token, and the assistant's tokens and the position after them, whose hidden
    states are goals of the loss.

    Args:
        assistant_mask (`torch.BoolTensor` of shape `[L]`): true at the assistant's tokens.
        visual_mask (`torch.BoolTensor` of shape `[L]`): true at visual positions.
        all_hidden_states: select all positions, for drafts that fuse visual positions too.
        kept_visual (`torch.BoolTensor` of shape `[L]`, *optional*): the visual positions that a draft reads. Default:
            all.
    """
    rows = torch.full_like(visual_mask, all_hidden_states)
    read = ~visual_mask
    if all_hidden_states:
        read |= visual_mask if kept_visual is None else kept_visual
    rows[:-1] = read[1:]
    rows |= assistant_mask
    rows[1:] |= assistant_mask[:-1]
    return rows


def sample_bytes(num_tokens: int, num_visual: int, num_hidden: int, hidden_size: int, width: int, storage: str) -> int:
    """Bytes of a sample: `num_tokens` ids and masks, `num_visual` rows of `hidden_size`, `num_hidden` of `width`."""
    block = hidden_size * _DTYPES[storage].itemsize + (_SCALE_BYTES if storage == "int8" else 0)
    return num_tokens * _TOKEN_BYTES + (num_visual + num_hidden * (width // hidden_size)) * block


def pack(name: str, rows: torch.Tensor, hidden_size: int, storage: str) -> dict[str, torch.Tensor]:
    """
    Converts rows `[R, W]` to a number format. Returns the tensors by the names of their fields in a shard.

    int8 has a float32 scale for each block of `hidden_size` numbers, because the layers of a target differ in scale.
    """
    if storage != "int8":
        return {name: rows.to(_DTYPES[storage])}
    blocks = rows.float().unflatten(-1, (-1, hidden_size))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    quantised = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return {name: quantised.flatten(-2), _scales_of(name): scales.squeeze(-1)}


def _scales_of(name: str) -> str:
    return name.partition("_")[0] + "_scales"


def write_shard(path: Path, samples: list[dict[str, torch.Tensor]]) -> None:
    """Writes samples, whose packed fields are `[rows, ...]` each, as one shard file."""
    tensors = {}
    for name in samples[0]:
        tensors[name] = torch.cat([sample[name] for sample in samples])
        lengths = torch.tensor([0, *(len(sample[name]) for sample in samples)])
        tensors[_OFFSETS[name]] = lengths.cumsum(0)
    with safely_replaced_file(path) as temporary:
        # One entry of metadata at most: safetensors writes several in random order.
        save_file(tensors, temporary, metadata={"format": "pt"})


class ShardReader:
    """Reads single samples of a shard. The other samples stay on disk."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, framework="pt")
            self.names = sorted(set(self.file.keys()) & set(_OFFSETS))
            self.offsets = {name: self.file.get_tensor(name) for name in set(_OFFSETS.values())}
        except (OSError, SafetensorError) as error:
            raise damaged_shard(path, str(error)) from error

    def read(self, number: int, hidden_size: int) -> dict[str, torch.Tensor]:
        """The fields of sample `number`. int8 becomes float32; other formats stay as they are stored."""
        sample = {}
        for name in self.names:
            start, end = self.offsets[_OFFSETS[name]][number : number + 2].tolist()
            sample[name] = self.file.get_slice(name)[start:end]
        for name in ("visual_embeds", "hidden_states"):
            scales = sample.pop(_scales_of(name), None)
            if scales is not None:
                blocks = sample[name].float().unflatten(-1, (-1, hidden_size))
                sample[name] = (blocks * scales.unsqueeze(-1)).flatten(-2)
        return sample


def damaged_shard(path: Path, detail: str) -> MSDError:
    return MSDError(
        f"The shard {path.name} of the feature cache in {str(path.parent)!r} is damaged: {detail}. Run the same "
        "extraction again: it writes this shard again and keeps the others."
    )


@contextmanager
def safely_replaced_file(path: Path) -> Iterator[Path]:
    """
    Like [`replaced_file`], but flushes the file to the disk before the file takes its name, so that a crash of the
    machine leaves no incomplete file.

    Raises:
        MSDError: when the file cannot be written.
    """
    try:
        with replaced_file(path) as temporary:
            yield temporary
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise MSDError(f"{str(path)!r} could not be written: {error}. What was written before it is kept.") from error


__all__ = [
    "STORAGES",
    "ShardReader",
    "damaged_shard",
    "pack",
    "resolve_storage",
    "safely_replaced_file",
    "sample_bytes",
    "stored_rows",
    "write_shard",
]
