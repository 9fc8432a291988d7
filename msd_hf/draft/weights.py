"""Checks the weight files of a draft by their headers, before memory for a single weight is allocated."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..errors import MSDCheckpointError
from .files import check_regular, errors_name_file, find_file, local_folder, read_json, require_file


_SAFETENSORS_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
# Original checkpoints contain a copy of the target's embedding. A draft uses the target's own embedding.
IGNORED_WEIGHTS = ("embed_tokens.weight",)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class StoredWeight:
    """What the header of a file says about a weight: shape, and dtype (its name if a draft can have no such dtype)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


def find_weight_files(name_or_path: str | Path, location: Mapping[str, Any], **choice: Any) -> list[Path]:
    """
    The weight files of a checkpoint that `from_pretrained` will read.

    Args:
        name_or_path: folder, repository id, or a single file.
        location: arguments of `from_pretrained` that say where files are.
        choice: `variant` and `use_safetensors`, arguments of `from_pretrained`.

    Returns:
        The files; an empty list if there are none, of which `from_pretrained` makes an error.

    Raises:
        MSDCheckpointError: when an index is damaged, or names a file that is missing or outside of the checkpoint.
    """
    if os.path.isfile(name_or_path):
        return [Path(name_or_path)]
    variant, use_safetensors = choice.get("variant"), choice.get("use_safetensors")
    names = [] if use_safetensors is False else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    names += [] if use_safetensors else [WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    for name in names:
        if variant is not None:
            stem, _, ending = name.rpartition(".")
            name = f"{stem}.{variant}.{ending}"
        path = find_file(name_or_path, name, location)
        if path is not None:
            return _shards(name_or_path, path, location) if name.endswith(".json") else [path]
    return []


def _shards(name_or_path: str | Path, index: Path, location: Mapping[str, Any]) -> list[Path]:
    fields = read_json(index)
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(fields.get("metadata"), dict):
        raise MSDCheckpointError(f"{str(index)!r} is not an index of weights: it has no `weight_map` and `metadata`.")
    folder = local_folder(name_or_path, location)
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if not _is_plain(name):
            raise MSDCheckpointError(
                f"{str(index)!r} names the file {name[:200]!r}, expected the name of a weight file in its own folder."
            )
        if folder is None:
            path = require_file(name_or_path, name, location)
        else:
            path = folder / name
            _check_inside(folder, path, index)
        files.append(path)
    return files


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    is_path = name.startswith("/") or "\\" in name or ":" in name or "\0" in name or ".." in parts
    return not is_path and name.endswith((".safetensors", ".bin"))


def _check_inside(folder: Path, path: Path, index: Path) -> None:
    """Refuses a shard that is missing, or is a link to a file outside of the folder. In the cache of the Hub, files
    are links into the folder `blobs` of their repository."""
    root = folder.resolve()
    roots = [root]
    for parent in root.parents:
        if parent.name == "snapshots":
            roots.append(parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise MSDCheckpointError(
            f"{str(index)!r} names {str(path)!r}, a link to {str(target)!r}, expected a file in its own folder."
        )
    if not path.exists():
        raise MSDCheckpointError(f"{str(index)!r} names {str(path)!r}, but there is no such file.")
    check_regular(path)


def read_headers(files: list[Path]) -> dict[str, StoredWeight]:
    """
    Reads shape and dtype of every weight, and no weight.

    Raises:
        MSDCheckpointError: when a file is damaged, or two files hold the same weight.
    """
    headers: dict[str, StoredWeight] = {}
    for file in files:
        check_regular(file)
        if file.suffix == ".safetensors":
            with errors_name_file(file, "a safetensors file"):
                found = _safetensors_header(file)
        else:
            with errors_name_file(file, "a file of weights that torch saved"):
                found = _pickle_header(file)
        repeated = sorted(headers.keys() & found.keys())
        if repeated:
            raise MSDCheckpointError(f"{str(file)!r} holds weights that another file holds too: {_listed(repeated)}.")
        headers |= found
    return headers


def _safetensors_header(file: Path) -> dict[str, StoredWeight]:
    with safe_open(file, framework="pt") as opened:  # compares all offsets with the size of the file
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        return {
            name: StoredWeight(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }


def _pickle_header(file: Path) -> dict[str, StoredWeight]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, as torch never writes them.")
    with torch.device("cpu"):  # a default device of the caller must not matter
        weights = torch.load(file, map_location="meta", weights_only=True)  # runs no code of the file
    if not isinstance(weights, dict):
        raise ValueError(f"it holds a {type(weights).__name__}, expected a dictionary of weights.")
    headers, storages = {}, {}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"it holds a weight without a name ({type(name).__name__}).")
        if not isinstance(value, torch.Tensor):
            headers[name] = StoredWeight((), type(value).__name__)
            continue
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{name!r} is no dense weight.")
        storage = value.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes():
            raise ValueError(f"{name!r} has more elements than the file.")
        headers[name] = StoredWeight(tuple(value.shape), value.dtype)
    if sum(storages.values()) > file.stat().st_size:
        raise ValueError("it claims more weights than it has bytes.")
    return headers


def check_headers(
    name_or_path: str | Path, model: nn.Module, headers: Mapping[str, StoredWeight], accept_other_shapes: bool = False
) -> None:
    """
    Compares the weights in the files of a draft with those of its model.

    Args:
        name_or_path: the checkpoint.
        model: the draft, without memory for its weights (on the device "meta").
        headers: what the files hold.
        accept_other_shapes: accept weights of another shape, which `from_pretrained` then leaves out.

    Raises:
        MSDCheckpointError: names every weight that is missing, unexpected, or of the wrong shape or dtype.
    """
    expected = model.state_dict()
    # transformers reads weights with and without the prefix of a base model.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored = {name if name in expected else name.removeprefix(prefix): weight for name, weight in headers.items()}
    problems: dict[str, list[str]] = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys() - set(getattr(model, "ignored_weights", ()))),
        "of the wrong shape": [],
        "of the wrong dtype": [],
    }
    for name in sorted(expected.keys() & stored.keys()):
        weight, own = stored[name], expected[name]
        if weight.shape != tuple(own.shape) and not accept_other_shapes:
            problems["of the wrong shape"].append(f"{name} ({list(weight.shape)}, expected {list(own.shape)})")
        if weight.dtype not in (_FLOATS if own.is_floating_point() else (own.dtype,)):
            kind = "a floating-point dtype" if own.is_floating_point() else str(own.dtype)
            problems["of the wrong dtype"].append(f"{name} ({weight.dtype}, expected {kind})")
    raise_problems(name_or_path, problems)


def check_memory(name_or_path: str | Path, model: nn.Module, files: list[Path]) -> None:
    """
    Checks that the files of quantised weights are large enough for the model, with at least one bit an element.

    Raises:
        MSDCheckpointError: when they are not.
    """
    num_elements = sum(value.numel() for value in model.state_dict().values())
    num_bytes = sum(file.stat().st_size for file in files)
    if num_elements > 8 * num_bytes:
        raise MSDCheckpointError(
            f"The weights in {str(name_or_path)!r} have {num_bytes:,} bytes, too few for the {num_elements:,} weights "
            "of the draft that its config.json describes."
        )


def raise_problems(name_or_path: str | Path, problems: Mapping[str, list[str]]) -> None:
    """
    Makes one error of the weights that are wrong.

    Args:
        name_or_path: the checkpoint.
        problems: for each kind of problem the names of weights.

    Raises:
        MSDCheckpointError: names the weights, if there are any.
    """
    found = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
    if found:
        raise MSDCheckpointError(
            f"The weights in {str(name_or_path)!r} are not those of the draft that its config.json describes; "
            + "; ".join(found)
            + "."
        )


def _listed(names: list[str], most: int = 50) -> str:
    shown = ", ".join(name[:200] for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


__all__ = [
    "IGNORED_WEIGHTS",
    "StoredWeight",
    "check_headers",
    "check_memory",
    "find_weight_files",
    "raise_problems",
    "read_headers",
]
