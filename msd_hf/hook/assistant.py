"""What a user gives as `assistant_model`: a draft, a wrapper around one, a name, or another assistant."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoders import head_of
from ..draft.auto import draft_class_of
from ..draft.interface import draft_kinds, is_draft
from ..errors import MSDUnsupportedError


logger = logging.get_logger(__name__)


def find_draft(assistant_model: Any) -> Any:
    """
    Returns the draft that the user means, or `None` for another assistant and for no assistant.

    A draft inside of `torch.compile`, `DataParallel`, `DistributedDataParallel` or a model of peft is taken out of its
    wrapper. Adapters of peft stay active, because they are part of the draft's layers.

    Args:
        assistant_model (`Any`): the argument of `generate`.

    Raises:
        MSDUnsupportedError: when the argument is a name, a class or a configuration, or a module around a draft that
            cannot be unwrapped.
    """
    if isinstance(assistant_model, (str, os.PathLike)):
        raise MSDUnsupportedError(
            f"`assistant_model={str(assistant_model)!r}` is a name, and `generate` takes a model. Load it first: "
            f"`assistant_model=msd_hf.AutoDraft.from_pretrained({str(assistant_model)!r})`."
        )
    if _is_class_or_config(assistant_model):
        raise MSDUnsupportedError(
            f"`assistant_model` is {_described(assistant_model)}, and `generate` takes a model: load one with "
            "`MSDDraftModel.from_pretrained`, or make a new one with `MSDDraftModel.from_target`."
        )
    if not isinstance(assistant_model, nn.Module):
        return None
    inside = _unwrapped(assistant_model)
    if is_draft(inside):
        return inside
    if any(is_draft(module) for module in assistant_model.modules()):
        raise MSDUnsupportedError(
            f"`assistant_model` is a `{type(assistant_model).__name__}` around an MSD draft. Give the draft itself, "
            "because the loop asks more of a draft than its forward."
        )
    return None


def _is_class_or_config(given: Any) -> bool:
    kinds = draft_kinds()
    classes = (*kinds, *kinds.values())
    return issubclass(given, classes) if isinstance(given, type) else isinstance(given, tuple(kinds))


def _described(given: Any) -> str:
    return f"the class `{given.__name__}`" if isinstance(given, type) else f"a `{type(given).__name__}`"


def _unwrapped(model: nn.Module) -> Any:
    inside: Any = model
    while not is_draft(inside):
        if isinstance(inside, torch.distributed.fsdp.FullyShardedDataParallel):
            break  # holds a part of each weight
        outer, inside = inside, extract_model_from_parallel(inside, keep_torch_compile=False)
        if hasattr(inside, "get_base_model") and hasattr(inside, "peft_config"):
            inside = inside.get_base_model()
        if inside is outer:
            break
    if is_draft(inside) and hasattr(model, "_orig_mod"):
        logger.warning_once(
            "`torch.compile(draft)` has no effect in `generate`, which runs the draft in parts. Set "
            "`draft.generation_config.compile = True` instead."
        )
    return inside


def load_draft(name: str | os.PathLike[str], target: PreTrainedModel) -> Any:
    """
    Loads the draft in a folder or a repository of the Hub, with the dtype of the target's head and on its device;
    `None` if there is another model.

    Raises:
        OSError: when there is no such folder or repository, or no `config.json` in it.
        MSDCheckpointError: when the draft is broken.
    """
    model_class = draft_class_of(name)
    if model_class is None:
        return None
    head = head_of(target)
    dtype = target.dtype if head is None or not head.weight.dtype.is_floating_point else head.weight.dtype
    return beside_target(model_class.from_pretrained(name, dtype=dtype), target)


def beside_target(draft: Any, target: PreTrainedModel) -> Any:
    """Moves a draft to the device of the target's head, unless accelerate has placed one of them."""
    head = head_of(target)
    placed = any(hasattr(model, "hf_device_map") for model in (draft, target))
    if head is None or placed or head.weight.is_meta or draft.device == head.weight.device:
        return draft
    return draft.to(head.weight.device)


__all__ = ["beside_target", "find_draft", "load_draft"]
