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


__all__ = ["decoder_of", "head_of"]
