"""The kinds of a decoder's layers: what each sees, which have states, and which cannot be served."""

from __future__ import annotations

import inspect

from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from ..attention.masks import EVERYTHING, Reach
from ..kv.indexed import BLOCK_INDEXED
from ..kv.reference_window import REFERENCE_WINDOW


# Whether recurrent layers of this transformers keep their states in the cache by number, as ours do.
KEEPS_STATES = "number_of_states" in inspect.signature(LinearAttentionLayer.__init__).parameters

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Kinds with an indexer, which chooses slots or blocks of slots.
INDEXED = frozenset({"indexed_attention", BLOCK_INDEXED})
# Kinds of layers with recurrent or convolutional states, which attention masks do not concern.
RECURRENT = ("linear_attention", "conv")
# Kinds of layers with attention beside a recurrence, and the kind of their attention.
HYBRID = {"hybrid": _FULL, "hybrid_sliding": _SLIDING}
# Kinds of layers without any state.
_STATELESS = ("moe", "mlp")
# Kinds of attention that a tree can be verified in, whatever the model.
SERVED_LAYERS = frozenset({_FULL, _SLIDING, _CHUNKED, REFERENCE_WINDOW}) | INDEXED
# Why a tree cannot be verified in others.
_UNKNOWN = "are of no kind that candidate trees are known to work with"
_COMPRESSED = "keep several tokens in one slot of the cache, out of which a rejected branch cannot be taken again"
_UNSERVED_LAYERS = {
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
}


def _layer_types(text_config: PreTrainedConfig) -> list[str] | None:
    return getattr(text_config, "layer_types", None)


def has_recurrent_layers(text_config: PreTrainedConfig) -> bool:
    """Whether some layers of a decoder have recurrent or convolutional states."""
    return bool(recurrent_layers(text_config))


def recurrent_layers(text_config: PreTrainedConfig) -> list[int]:
    """The numbers of the layers of a decoder that have recurrent or convolutional states."""
    kinds = {*RECURRENT, *HYBRID}
    return [number for number, kind in enumerate(_layer_types(text_config) or ()) if kind in kinds]


# Inputs that a decoder reads in every forward, `[B, ...]`: states of images or of another modality, and masks that say
# which of them a token reads. The value is the dimension of the text, if there is one.
STEP_INPUTS: dict[str, int | None] = {
    "cross_attention_mask": 2,
    "full_text_row_masked_out_mask": 2,
    "image_attention_mask": 1,
    "image_encoder_embeddings": None,
    "perceiver_embeddings": None,
    "protein_input_ids": None,
    "protein_attention_mask": None,
}


def image_layers(text_config: PreTrainedConfig) -> frozenset[int]:
    """The layers of a decoder that read states of images by cross-attention, and keep those in the cache."""
    return frozenset(getattr(text_config, "cross_attention_layers", None) or ())


def attention_reaches(text_config: PreTrainedConfig) -> dict[str, Reach]:
    """How far back the tokens of each kind of attention of a decoder see."""
    window = getattr(text_config, "sliding_window", None)
    chunk = getattr(text_config, "attention_chunk_size", None)
    layer_types = _layer_types(text_config)
    if layer_types is None:  # Mistral has a window on every layer and no list of layer types
        layer_types = [_SLIDING if window is not None else _CHUNKED if chunk is not None else _FULL]
    limited = {
        _SLIDING: Reach(window=window),
        _CHUNKED: Reach(chunk=chunk),
        REFERENCE_WINDOW: Reach(window=window, spares_prompt=True),
    }
    kinds = {HYBRID.get(kind, kind) for kind in layer_types} - {*RECURRENT, *_STATELESS}
    return {kind: limited.get(kind, EVERYTHING) for kind in sorted(kinds)}


def layer_reaches(text_config: PreTrainedConfig) -> list[Reach]:
    """How far back the tokens of each layer of a decoder that has attention see."""
    reaches = attention_reaches(text_config)
    layer_types = _layer_types(text_config)
    if layer_types is None:
        return [next(iter(reaches.values()))] * text_config.num_hidden_layers
    kinds = [HYBRID.get(kind, kind) for kind in layer_types]
    return [reaches[kind] for kind in kinds if kind in reaches]


def why_unserved(kind: str) -> str:
    """Why a tree cannot be verified in layers of a kind, as a clause behind "layers, which ..."."""
    return _UNSERVED_LAYERS.get(kind, _UNKNOWN)


__all__ = [
    "HYBRID",
    "INDEXED",
    "KEEPS_STATES",
    "RECURRENT",
    "SERVED_LAYERS",
    "STEP_INPUTS",
    "attention_reaches",
    "has_recurrent_layers",
    "image_layers",
    "layer_reaches",
    "recurrent_layers",
    "why_unserved",
]
