"""Repeated text: if the last tokens have occurred before, the tokens after them are added to the tree as a branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .candidate import CandidateTree


NGRAM = 3  # number of last tokens that must have occurred before
_VISUAL = -1  # stands for a visual position


class SuffixIndex:
    """
    Finds where the last tokens of a sequence have occurred before. Costs O(1) per token.

    Args:
        tokens (`Iterable[int]`): the first tokens of the sequence. Negative ones are never proposed.
        ngram (`int`): how many tokens must match.
    """

    def __init__(self, tokens: Iterable[int] = (), ngram: int = NGRAM):
        self.tokens: list[int] = []
        self.ngram = ngram
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence
        self._match: int | None = None  # index of the token after the earlier occurrence of the last tokens
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the sequence, and finds the match of its new end."""
        for token in tokens:
            # A match is followed while it holds, because it is longer than a match that begins with this token.
            holds = self._match is not None and self.tokens[self._match] == token
            self.tokens.append(token)
            key = tuple(self.tokens[-self.ngram :])
            self._match = self._match + 1 if holds else self._next.get(key)  # type: ignore[operator]
            self._next[key] = len(self.tokens)

    def continuation(self, length: int) -> list[int]:
        """The tokens after the match, at most `length`; none without a match. They end before an image. At the end of
        the sequence they go on from the match again, as a text that repeats itself does."""
        if self._match is None:
            return []
        period = len(self.tokens) - self._match
        tokens = [self.tokens[self._match + step % period] for step in range(length)]
        return tokens[: next((step for step, token in enumerate(tokens) if token < 0), length)]


class SuffixBranches:
    """
    Adds branches to the trees of a batch. A branch depends only on prompt and emitted tokens, so the trees stay
    independent of the random draws of their verification.

    Args:
        prompts (`torch.LongTensor` of shape `[B, L]`): the prompts. Tokens that only a filled cache holds are not
            searched.
        visual_mask (`torch.BoolTensor` of shape `[B, L]`): true at visual positions, which are not proposed.
    """

    def __init__(self, prompts: torch.Tensor, visual_mask: torch.Tensor):
        self._prompts = prompts.masked_fill(visual_mask, _VISUAL)
        self._indices: list[SuffixIndex] = []

    def added_to(self, tree: CandidateTree, num_nodes: int, emitted: Mapping[int, Sequence[int]]) -> CandidateTree:
        """
        Adds a branch to the tree of each row whose last tokens have occurred before.

        Args:
            tree (`CandidateTree`): the trees of the running rows.
            num_nodes (`int`): nodes to add to each tree. In a batch, rows without a match get nodes with token 0.
            emitted (`Mapping[int, Sequence[int]]`): row of the batch -> its emitted tokens, for each running row, in
                the order of the trees.

        Returns:
            The larger trees, or the given ones if no row has a match.
        """
        if num_nodes == 0:
            return tree
        if not self._indices:
            self._indices = [SuffixIndex(prompt) for prompt in self._prompts.tolist()]
        length = tree.max_depth + num_nodes
        rows = [self._continuation(row, tokens, length) for row, tokens in emitted.items()]
        if not any(rows):
            return tree
        # Padded with token 0. Any token would do: `with_branch` reuses a node that has it already, so siblings stay
        # different.
        chains = [[*tokens, *[0] * (length - len(tokens))] for tokens in rows]
        return tree.with_branch(torch.tensor(chains, device=tree.tokens.device), num_nodes)

    def _continuation(self, row: int, emitted: Sequence[int], length: int) -> list[int]:
        index = self._indices[row]
        index.extend(emitted[len(index.tokens) - self._prompts.shape[1] :])
        return index.continuation(length)


__all__ = ["NGRAM", "SuffixBranches", "SuffixIndex"]
