"""Names that differ between the supported releases of transformers."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils
from transformers.generation.utils import ALL_CACHE_NAMES


# The argument of a forward, and the field of its output, that hold the KV cache: `cache` from 5.24 on, before it
# `past_key_values`.
CACHE_NAME: str = ALL_CACHE_NAMES[0]

# The class of a cache layer that holds nothing: a layer of the model that reads the keys of an earlier one has such a
# layer, or none at all. Older releases have no such class.
_DUMMY_LAYER: type | None = getattr(cache_utils, "DummyLayer", None)


def holds_nothing(layer: Any) -> bool:
    """Whether a layer of a KV cache never holds anything."""
    return _DUMMY_LAYER is not None and isinstance(layer, _DUMMY_LAYER)


__all__ = ["CACHE_NAME", "holds_nothing"]
