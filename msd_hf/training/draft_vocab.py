"""A draft vocabulary from training data: the tokens that answers are made of, most frequent first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import MSDDataError, MSDError
from .data.conversations import Conversations
from .data.encoding import ConversationEncoder


# What is chosen by itself covers so much of the data, with no more than this part of the vocabulary.
AUTO_COVERAGE = 0.995
AUTO_LARGEST_SHARE = 0.25
# A head that is not even half as long hardly pays for the acceptance that it loses.
LARGEST_PAYING_SHARE = 0.5

_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class TokenCounts:
    """
    How often each of V tokens stands in the answers of some conversations.

    Args:
        counted (`torch.LongTensor` of shape `[V]`): in those by which tokens are ranked.
        held_out (`torch.LongTensor` of shape `[V]`): in the others, one in ten.
        num_samples (`int`): conversations that were used.
        skipped (`dict[str, int]`): those that could not be, by reason.
    """

    counted: torch.Tensor
    held_out: torch.Tensor
    num_samples: int
    skipped: dict[str, int]


def count_answer_tokens(
    data: Sequence[Conversations], processor: Any, vocab_size: int, strict: bool = False
) -> TokenCounts:
    """
    Counts the assistant's tokens, with those that end its answers. Images are not opened.

    Args:
        data (sequence of [`Conversations`]): one or more data sets.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the target's.
        vocab_size (`int`): rows of the target's head, V.
        strict (`bool`): raise at the first sample that cannot be used.

    Raises:
        MSDError: when no sample can be used, or one holds a token that the target's head lacks.
        MSDDataError: with `strict`.
    """
    encoder = ConversationEncoder(processor)
    counted, held_out = torch.zeros(2, vocab_size, dtype=torch.long)
    skipped: Counter[str] = Counter()
    num_samples = 0
    for conversations in data:
        for index in tqdm(range(len(conversations)), desc=conversations.name, leave=False):
            try:
                tokens = encoder.answer_tokens(conversations[index])
            except MSDDataError as error:
                if strict:
                    raise
                skipped[error.reason] += 1
                continue
            if len(tokens) and int(tokens.max()) >= vocab_size:
                raise MSDError(
                    f"The data has token {int(tokens.max())}, and the target's head only {vocab_size} rows: the "
                    "processor is not the target's."
                )
            num_samples += 1
            counts = held_out if num_samples % _HELD_OUT_EVERY == 0 else counted
            counts += tokens.bincount(minlength=vocab_size)
    if num_samples == 0:
        names = ", ".join(conversations.name for conversations in data)
        raise MSDError(f"No conversation in the data ({names}) can be used: {dict(skipped) or 'it is empty'}.")
    return TokenCounts(counted, held_out, num_samples, dict(skipped))


def frequent_tokens(counts: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """
    The most frequent tokens, most frequent first. Among equals lower ids come first, so that tokens that are not in
    the data at all fill up what is left.

    Args:
        counts (`torch.LongTensor` of shape `[V]`): how often each token was seen.
        size (`int`, *optional*): how many; by default as few as cover 99.5% of what was seen.

    Returns:
        `torch.LongTensor` of shape `[size]`.

    Raises:
        MSDError: when `size` is not between 1 and V; without `size`, when a quarter of the V tokens is not enough.
    """
    vocab_size = len(counts)
    if size is not None:
        check_size(size, vocab_size)
    ranked = counts.sort(descending=True, stable=True)
    if size is None:
        covered = ranked.values.cumsum(0) / counts.sum()
        size = int((covered < AUTO_COVERAGE).sum()) + 1
        largest = int(AUTO_LARGEST_SHARE * vocab_size)
        if size > largest:
            raise MSDError(
                f"No draft vocabulary pays on this data: {AUTO_COVERAGE:.1%} of the tokens take {size:,} of "
                f"{vocab_size:,} different ones, and the {largest:,} most frequent cover {covered[largest - 1]:.1%}. "
                "Leave the draft as it is, or choose a size yourself."
            )
    return ranked.indices[:size]


def check_size(size: int, vocab_size: int) -> None:
    """
    Raises:
        MSDError: when a draft vocabulary of `size` cannot be made of `vocab_size` tokens.
    """
    if not 1 <= size <= vocab_size:
        raise MSDError(
            f"A draft vocabulary has between 1 and {vocab_size:,} tokens, all of the target's; got {size:,}."
        )


def coverage(counts: torch.Tensor, tokens: torch.Tensor) -> float:
    """Which share of what was seen (`[V]`) is among `tokens`; 0 if nothing was."""
    return int(counts[tokens].sum()) / max(1, int(counts.sum()))


__all__ = ["TokenCounts", "check_size", "count_answer_tokens", "coverage", "frequent_tokens"]
