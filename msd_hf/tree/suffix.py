"""Text that goes on as it did before: a suffix match in the tokens so far adds a branch to the candidate tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .candidate import CandidateTree


NGRAM = 3  # tokens that must have come before, in this order
_VISUAL = -1


class SuffixIndex:
    """
    One sequence, and where its last tokens came before. Costs O(1) per token.

    Args:
        tokens (`Iterable[int]`): how it begins; negative ones are never proposed.
        ngram (`int`): how many tokens must match.
    """

    def __init__(self, tokens: Iterable[int] = (), ngram: int = NGRAM):
        self.tokens: list[int] = []
        self.ngram = ngram
        self._places: dict[tuple[int, ...], int] = {}  # an n-gram -> the place behind its latest occurrence
        self._match: int | None = None  # the place behind the earlier occurrence that the last token goes on
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            # A match is followed as long as it holds: it is longer than any that begins now.
            holds = self._match is not None and self.tokens[self._match] == token
            self.tokens.append(token)
            key = tuple(self.tokens[-self.ngram :])
            self._match = self._match + 1 if holds else self._places.get(key)  # type: ignore[operator]
            self._places[key] = len(self.tokens)

    def continuation(self, length: int) -> list[int]:
        """What came after the match, `length` tokens or fewer: up to an image, none without a match. A match that
        reaches the end of the sequence goes on with itself."""
        if self._match is None:
            return []
        period = len(self.tokens) - self._match
        tokens = [self.tokens[self._match + step % period] for step in range(length)]
        return tokens[: next((step for step, token in enumerate(tokens) if token < 0), length)]


class SuffixBranches:
    """
    Adds branches to the trees of a batch. They follow from what was emitted alone, so trees stay independent of the
    random draws of their verification.

    Args:
        prompts (`torch.LongTensor` of shape `[B, L]`): the prompts. What a filled cache holds besides is not searched.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions, which are not proposed.
    """

    def __init__(self, prompts: torch.Tensor, visual_mask: torch.Tensor):
        self._prompts = prompts.masked_fill(visual_mask, _VISUAL)
        self._indices: list[SuffixIndex] = []

    def added_to(self, tree: CandidateTree, num_nodes: int, emitted: Mapping[int, Sequence[int]]) -> CandidateTree:
        """
        Adds the branches.

        Args:
            tree (`CandidateTree`): of the running rows.
            num_nodes (`int`): nodes to add to each row. In a batch, rows without a match get inert ones.
            emitted (`Mapping[int, Sequence[int]]`): the tokens that each running row has emitted so far, by its number
                in the batch, in the order of the tree's rows.

        Returns:
            The larger tree, or the same one if no row repeats itself.
        """
        if num_nodes == 0:
            return tree
        if not self._indices:
            self._indices = [SuffixIndex(prompt) for prompt in self._prompts.tolist()]
        length = tree.max_depth + num_nodes
        rows = [self._continuation(row, tokens, length) for row, tokens in emitted.items()]
        if not any(rows):
            return tree
        # Behind the end any token will do: a path goes down nodes that carry it, so siblings differ.
        chains = [[*tokens, *[0] * (length - len(tokens))] for tokens in rows]
        return tree.with_branch(torch.tensor(chains, device=tree.tokens.device), num_nodes)

    def _continuation(self, row: int, emitted: Sequence[int], length: int) -> list[int]:
        index = self._indices[row]
        index.extend(emitted[len(index.tokens) - self._prompts.shape[1] :])
        return index.continuation(length)


__all__ = ["NGRAM", "SuffixBranches", "SuffixIndex"]
