"""The decoder of a target, the module that reads embeddings and returns hidden states, and the head behind it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def decoder_of(target: PreTrainedModel) -> Any:
    """
    The decoder that `get_decoder()` names. Llama 4 names a causal language model, whose output are logits: its decoder
    is the one model within it that holds the embedding. A target without such a model is returned itself.
    """
    decoder: Any = target.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT calls its head `decoder`
        decoder = target
    while decoder.get_output_embeddings() is not None:
        embedding = decoder.get_input_embeddings()
        inner = [
            child
            for child in decoder.children()
            if isinstance(child, PreTrainedModel) and any(module is embedding for module in child.modules())
        ]
        if len(inner) != 1:
            break
        decoder = inner[0].get_decoder()
    return decoder


def head_of(target: PreTrainedModel) -> Any:
    """The language-model head of a target; `None` if it has none. A model that wraps a causal language model may name
    no head of its own, as Nemotron-H Omni does not."""
    head = target.get_output_embeddings()
    decoder = target.get_decoder()
    if head is not None or decoder is target or not isinstance(decoder, PreTrainedModel):
        return head
    return decoder.get_output_embeddings()


def padding_position(decoder: Any) -> int | None:
    """
    The position of padding in a decoder that counts positions by itself unless it is given some: position tables of
    fairseq's kind, as Kosmos has them, give padding tokens the position `padding_idx`, and a text begins behind it.
    `None` for other decoders.
    """
    table: Any = getattr(decoder, "embed_positions", None)
    return table.padding_idx if hasattr(table, "create_position_ids_from_input_ids") else None


def position_behind(decoder: Any, num_slots: int) -> int:
    """The position behind `num_slots` tokens, in a decoder that is given no positions."""
    padding = padding_position(decoder)
    return num_slots if padding is None else num_slots + padding + 1


__all__ = ["decoder_of", "head_of", "padding_position", "position_behind"]
