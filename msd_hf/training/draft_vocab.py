"""A draft vocabulary from training data: the most frequent tokens of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import MSDDataError, MSDError
from .data.conversations import StreamedConversations
from .data.encoding import ConversationEncoder
from .data.skipped import SkippedSamples
from .features.cache import FeatureCache


# Without a given size, a vocabulary is the smallest one that covers this share of the tokens in the data. It is
# refused if it has more than AUTO_LARGEST_SHARE of the target's tokens.
AUTO_COVERAGE = 0.995
AUTO_LARGEST_SHARE = 0.25
# A head with a larger share of the target's rows saves too little time for the acceptance that it loses.
LARGEST_PAYING_SHARE = 0.5

_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class TokenCounts:
    """
    How often each of V tokens occurs in the answers of conversations.

    Args:
        counted (`torch.LongTensor` of shape `[V]`): counts in the conversations by which tokens are ranked.
        held_out (`torch.LongTensor` of shape `[V]`): counts in the remaining conversations, one in ten.
        num_samples: number of conversations that were used.
        skipped: number of conversations that could not be used, by reason.
    """

    counted: torch.Tensor
    held_out: torch.Tensor
    num_samples: int
    skipped: dict[str, int]


def count_answer_tokens(data: Sequence[Any], processor: Any, vocab_size: int, strict: bool = False) -> TokenCounts:
    """
    Counts the tokens of the assistant's answers, including the tokens that end them. Images are not opened.

    Args:
        data: one or more data sets of conversations.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the target's processor.
        vocab_size: number of rows of the target's head, V.
        strict: raise at the first sample that cannot be used.

    Raises:
        MSDError: when no sample can be used, or a sample holds a token that the target's head lacks.
        MSDDataError: with `strict`, when a sample cannot be used.
    """
    encoder = ConversationEncoder(processor)
    counted, held_out = torch.zeros(2, vocab_size, dtype=torch.long)
    skipped = SkippedSamples(strict)
    num_samples = 0
    for conversations in data:
        for index in tqdm(range(len(conversations)), desc=_name_of(conversations), leave=False):
            try:
                tokens = encoder.answer_tokens(conversations[index])
            except MSDDataError as error:
                skipped.add(error)
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
        names = ", ".join(map(_name_of, data))
        raise MSDError(f"No conversation in the data ({names}) can be used: {dict(skipped.reasons) or 'it is empty'}.")
    return TokenCounts(counted, held_out, num_samples, dict(skipped.reasons))


def answer_vocabulary(data: Sequence[Any], processor: Any, vocab_size: int, size: int) -> torch.Tensor:
    """
    The tokens of a new draft: the most frequent ones of the answers in the training data.

    Args:
        data: the training data, opened.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): the target's processor.
        vocab_size: number of tokens of the target.
        size: number of tokens.

    Returns:
        `torch.LongTensor` of shape `[size]`.

    Raises:
        MSDError: when there cannot be so many tokens, or the data cannot be counted.
    """
    check_size(size, vocab_size)
    for dataset in data:
        if isinstance(dataset, (FeatureCache, StreamedConversations)):
            what = "cached features" if isinstance(dataset, FeatureCache) else "a stream"
            raise MSDError(
                f"`draft_vocab_size` counts the tokens of conversations before the training, and the data is {what}: "
                "give conversations, leave `draft_vocab_size` out, or give a draft that has its vocabulary as `model`."
            )
    counts = count_answer_tokens(data, processor, vocab_size)
    return frequent_tokens(counts.counted + counts.held_out, size)


def frequent_tokens(counts: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """
    The ids of the most frequent tokens, most frequent first. Of equally frequent tokens the lower id comes first. If
    fewer than `size` tokens occur in the data, the rest are the lowest ids that do not occur.

    Args:
        counts (`torch.LongTensor` of shape `[V]`): number of occurrences of each token.
        size (*optional*): number of tokens; by default the smallest number that covers 99.5% of all occurrences.

    Returns:
        `torch.LongTensor` of shape `[size]`.

    Raises:
        MSDError: when `size` is not between 1 and V; without `size`, when it would be more than a quarter of V.
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
                "Use the draft without a vocabulary of its own, or choose a size yourself."
            )
    return ranked.indices[:size]


def check_size(size: int, vocab_size: int) -> None:
    """
    Checks that a draft vocabulary of `size` tokens can be chosen from `vocab_size` tokens.

    Raises:
        MSDError: when `size` is not between 1 and `vocab_size`.
    """
    if not 1 <= size <= vocab_size:
        raise MSDError(
            f"A draft vocabulary has between 1 and {vocab_size:,} tokens, all of the target's; got {size:,}."
        )


def coverage(counts: torch.Tensor, tokens: torch.Tensor) -> float:
    """The share of all occurrences in `counts` (`[V]`) that `tokens` cover; 0 if `counts` is all zero."""
    return int(counts[tokens].sum()) / max(1, int(counts.sum()))


def _name_of(conversations: Any) -> str:
    return getattr(conversations, "name", "conversations")


__all__ = ["TokenCounts", "answer_vocabulary", "check_size", "count_answer_tokens", "coverage", "frequent_tokens"]
