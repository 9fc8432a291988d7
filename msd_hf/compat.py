"""Names that differ between the supported releases of transformers."""

from __future__ import annotations

from transformers.generation.utils import ALL_CACHE_NAMES


# The argument of a forward, and the field of its output, that hold the KV cache: `cache` from 5.24 on, before it
# `past_key_values`.
CACHE_NAME: str = ALL_CACHE_NAMES[0]

__all__ = ["CACHE_NAME"]
