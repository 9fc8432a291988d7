"""The rounds of one answer as texts: the candidates of each tree, and which of them the target has accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..draft.modeling_msd import MSDDraftModel
from ..observer import observing
from ..tree.candidate import CandidateTree
from .methods import TREE, Method


@dataclass(frozen=True)
class RecordedRound:
    """
    One round: its candidate tree of N nodes and the tokens that it emitted.

    Args:
        tokens: text of each node. Node 0 is the root, the last token before the round.
        parents: parent of each node; the root is its own.
        probabilities: the draft's probability of the path to each node; `None` for nodes that it has not proposed.
        accepted: numbers of the accepted nodes, from the root downwards.
        emitted: texts of the emitted tokens. The first ones are those of the accepted nodes, without the root.
    """

    tokens: list[str]
    parents: list[int]
    probabilities: list[float | None]
    accepted: list[int]
    emitted: list[str]


def record_rounds(
    target: PreTrainedModel,
    draft: MSDDraftModel,
    inputs: Mapping[str, Any],
    tokenizer: Any,
    method: Method = TREE,
    seed: int | None = None,
    **generate_arguments: Any,
) -> tuple[str, list[RecordedRound]]:
    """
    Runs `generate` once and records its rounds. The method must decode in our own loop; other arguments are those of
    [`timed_generate`].

    Returns:
        The text of the first token, which the prefill gives, and the rounds.
    """
    if seed is not None:
        torch.manual_seed(seed)
    trees: list[CandidateTree] = []

    def on_verify(verify: Any, tree: CandidateTree, cache: Any) -> Any:
        trees.append(tree.clone())  # read back later: it would delay the round
        return verify(tree)

    rounds = _Emitted()
    with method.prepared(target, draft) as arguments, observing(on_verify=on_verify, notices=False):
        target.generate(**inputs, **{**generate_arguments, **arguments}, streamer=rounds)
    first, *emitted = _texts([tokens for tokens, _ in rounds.emitted], tokenizer)
    recorded = [
        _record(tree, tokens, num_draft_tokens, texts, tokenizer)
        for tree, (tokens, num_draft_tokens), texts in zip(trees, rounds.emitted[1:], emitted, strict=True)
    ]
    return "".join(first), recorded


class _Emitted(BaseStreamer):
    """A streamer that keeps the tokens of each round, and how many of them were drafted."""

    def __init__(self) -> None:
        self.emitted: list[tuple[list[int], int]] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.emitted.append((value.flatten().tolist(), 0))

    def put_verified(self, tokens: torch.Tensor, num_draft_tokens: int) -> None:
        self.emitted.append((tokens.flatten().tolist(), num_draft_tokens))

    def end(self) -> None:
        pass


def _texts(rounds: Sequence[Sequence[int]], tokenizer: Any) -> list[list[str]]:
    """The text that each token adds to the answer. A character of several tokens stands at the last of them."""
    tokens: list[int] = []
    shown, texts = "", []
    for emitted in rounds:
        pieces = []
        for token in emitted:
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if text.endswith("�"):
                text = shown
            pieces.append(text[len(shown) :])
            shown = text
        texts.append(pieces)
    return texts


def _record(
    tree: CandidateTree, emitted: Sequence[int], num_draft_tokens: int, texts: list[str], tokenizer: Any
) -> RecordedRound:
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    scores = [] if tree.scores is None else tree.scores[0].exp().tolist()
    accepted = [0]
    for token in emitted[:num_draft_tokens]:
        # A node may have two equal children: with an added branch. The first one was proposed by the draft.
        children = [node for node in range(1, len(tokens)) if parents[node] == accepted[-1] and tokens[node] == token]
        accepted += children[:1]
    return RecordedRound(
        [_node_text(tokens, parents, node, tokenizer) for node in range(len(tokens))],
        parents,
        [*scores, *[None] * (len(tokens) - len(scores))],
        accepted,
        texts,
    )


def _node_text(tokens: Sequence[int], parents: Sequence[int], node: int, tokenizer: Any) -> str:
    """The text of a node. Its parent is decoded too, because many tokenizers drop a space at the beginning."""
    if node == 0:
        return tokenizer.decode([tokens[0]])
    before, both = (tokenizer.decode(ids) for ids in ([tokens[parents[node]]], [tokens[parents[node]], tokens[node]]))
    return both[len(before) :]


__all__ = ["RecordedRound", "record_rounds"]
