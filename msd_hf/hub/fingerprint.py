"""Which target a draft was made for: its public name, and a fingerprint that is compared with the target of a call.

The fingerprint holds the signs of a few values of the head. Unlike a hash, signs do not change with the dtype that a
target is loaded in, and they tell a fine-tuned target (a few differ) from another model (half of them differ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..decoders import head_of
from .names import public_name


# Rows of the head, modulo the size of the vocabulary. They do not depend on it, because padding a vocabulary changes
# its size and no weight.
_ROWS = (3, 101, 257, 1009, 4099, 10007, 20011, 30011)
_COLUMNS = 64
# Another dtype turns a tiny value into zero; training that touches the head changes more signs than this.
_LARGEST_EQUAL_SHARE = 0.02


def identify_target(target: PreTrainedModel | PreTrainedConfig) -> dict[str, Any]:
    """
    The fields of a draft's configuration that say which target it is for.

    Args:
        target (`PreTrainedModel` or `PreTrainedConfig`): the target. A configuration has no head to look at.

    Returns:
        `target_name_or_path`, `target_revision` and `target_fingerprint`.
    """
    config = target if isinstance(target, PreTrainedConfig) else target.config
    name, revision = public_name(getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None))
    return {
        "target_name_or_path": name,
        "target_revision": revision,
        "target_fingerprint": _fingerprint(target, config),
    }


def _fingerprint(target: PreTrainedModel | PreTrainedConfig, config: PreTrainedConfig) -> dict[str, Any]:
    text_config = config.get_text_config(decoder=True)
    fingerprint: dict[str, Any] = {
        "architecture": type(target).__name__ if target is not config else (config.architectures or [None])[0],
        "hidden_size": getattr(text_config, "hidden_size", None),
        "vocab_size": getattr(text_config, "vocab_size", None),
        "head": None if isinstance(target, PreTrainedConfig) else head_signs(target),
    }
    return {name: value for name, value in fingerprint.items() if isinstance(value, int | str)}


@torch.no_grad()
def head_signs(target: PreTrainedModel) -> str | None:
    """
    The signs of a few values of a target's head, in hexadecimal digits.

    Returns:
        `None` if the head cannot be read without moving weights: it is quantised, sharded over processes, or kept
        elsewhere by accelerate.
    """
    weight: Any = getattr(head_of(target), "weight", None)
    text_config = target.config.get_text_config(decoder=True)
    shape = (getattr(text_config, "vocab_size", None), getattr(text_config, "hidden_size", None))
    # A shard has a class or a shape of its own.
    is_readable = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
    if not is_readable or not weight.is_floating_point() or tuple(weight.shape) != shape:
        return None
    rows = torch.tensor([row % len(weight) for row in _ROWS], device=weight.device)
    signs = (weight.detach()[rows, :_COLUMNS].float() > 0).flatten().tolist()
    bits = "".join("1" if sign else "0" for sign in signs)
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def sign_difference(saved: Any, target: PreTrainedModel) -> float | None:
    """
    The share of signs in which a saved fingerprint and a target's head differ.

    Args:
        saved (`dict`, *optional*): `target_fingerprint` of a draft's configuration.
        target (`PreTrainedModel`): the target of a call.

    Returns:
        About 0.5 for another model, and 0 for the same head in any dtype; `None` if they cannot be compared.
    """
    before = saved.get("head") if isinstance(saved, Mapping) else None
    return None if not isinstance(before, str) else _share(before, head_signs(target))


def is_other_head(saved: Any, other: Any) -> bool | None:
    """Whether two fingerprints, as [`identify_target`] makes them, are of different heads; `None` if they cannot be
    compared."""
    heads = [part.get("head") if isinstance(part, Mapping) else None for part in (saved, other)]
    share = _share(*heads)
    return None if share is None else share > _LARGEST_EQUAL_SHARE


def _share(before: Any, now: Any) -> float | None:
    """The share of signs in which two heads differ."""
    if not isinstance(before, str) or not isinstance(now, str) or not now or len(now) != len(before):
        return None
    try:
        different = (int(before, 16) ^ int(now, 16)).bit_count()
    except ValueError:  # an edited file
        return None
    return different / (4 * len(now))


def why_another_target(draft_config: Any, target: PreTrainedModel) -> str | None:
    """
    Why a target is not the one that a draft was made for, as a sentence; `None` if it is, or if that is not known.

    Args:
        draft_config (`MSDDraftConfig`): the draft's configuration.
        target (`PreTrainedModel`): the target, for which the draft has the right sizes.
    """
    share = sign_difference(getattr(draft_config, "target_fingerprint", None), target)
    if share is None or share <= _LARGEST_EQUAL_SHARE:
        return None
    made_for = getattr(draft_config, "target_name_or_path", None) or "another target"
    name = public_name(target.config._name_or_path)[0] or type(target).__name__
    return (
        f"The draft was trained for {made_for!r}, and the head of this target ({name!r}) has other weights: "
        f"{share:.0%} of the signs that were compared differ (50%: another model; a few percent: a fine-tuned one)."
    )


__all__ = ["head_signs", "identify_target", "is_other_head", "sign_difference", "why_another_target"]
