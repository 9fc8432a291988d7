"""Fingerprints of a target and of a draft, computed without reading all of their weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from ...decoders import head_of
from ...draft.configuration_msd import HINT, TARGET_FIELDS


# Fields of a config that do not change the function of a model. Quantisation changes it, but shows in the weights.
_VOLATILE_FIELDS = frozenset(
    (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "use_cache",
        "quantization_config",
        *HINT,
        *TARGET_FIELDS,
    )
)
_SAMPLED_VALUES = 1024  # number of values that are read at either end of a weight
_CHUNK_VALUES = 1 << 24


def target_fingerprint(target: PreTrainedModel) -> str:
    """
    Identifies a target by its configuration, its whole embedding and head, and both ends of every other weight.

    The fingerprint depends neither on the folder of the target, nor on its device, nor on a dtype that holds the same
    values (a bfloat16 checkpoint loaded as float32). It takes seconds for a model of 7B parameters.

    Returns:
        64 hexadecimal digits.
    """
    return _fingerprint(target, [target.get_input_embeddings(), head_of(target)])


def draft_fingerprint(draft: PreTrainedModel) -> str:
    """Identifies a draft by its configuration and both ends of every weight. Returns 64 hexadecimal digits."""
    return _fingerprint(draft, [])


def _fingerprint(model: PreTrainedModel, read_whole: list[Any]) -> str:
    config = json.dumps(_without_volatile(model.config.to_diff_dict()), sort_keys=True, default=str)
    digests = []
    for module in model.modules():
        weights = [*module._parameters.items(), *module._buffers.items()]
        names = [name for name, _ in weights if name not in module._non_persistent_buffers_set]
        if not names:
            continue
        # Loads the weights of modules that accelerate keeps elsewhere; does nothing for other modules.
        with align_module_device(module, torch.device("cpu")):
            for name in names:
                weight = getattr(module, name)
                if weight is not None:
                    digests.append(_digest(name, weight.detach(), whole=module in read_whole))
    # Sorted, because releases of transformers differ in the order and the names of modules.
    return hashlib.sha256("\n".join([config, *sorted(digests)]).encode()).hexdigest()


def _without_volatile(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {key: _without_volatile(value) for key, value in fields.items() if key not in _VOLATILE_FIELDS}
    return fields


def _digest(name: str, weight: torch.Tensor, whole: bool) -> str:
    digest = hashlib.sha256(f"{name} {list(weight.shape)}".encode())
    values = weight.reshape(-1)
    if whole or len(values) <= 2 * _SAMPLED_VALUES:
        chunks = values.split(_CHUNK_VALUES)
    else:
        chunks = (values[:_SAMPLED_VALUES], values[-_SAMPLED_VALUES:])
    for chunk in chunks:
        if chunk.is_floating_point():
            chunk = chunk.to(torch.float32)
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())  # quantised weights keep their bytes
    return digest.hexdigest()


__all__ = ["draft_fingerprint", "target_fingerprint"]
