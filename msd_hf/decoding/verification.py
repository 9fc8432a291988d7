"""Acceptance: a walk from the root that takes the target's choice at every node until it leaves the tree.

One rule serves greedy decoding and sampling. For a tree that does not depend on the random draws, taking the target's
own choice at each node has the law of the target, and the acceptance probability of recursive rejection sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..tree.candidate import CandidateTree
from .batch_selection import BatchSelector
from .token_selection import TokenSelector


@dataclass
class Verification:
    """The outcome of one verification, for each running row.

    Args:
        paths (`list[list[int]]`): the nodes whose slots stay in the cache: the root, then accepted ones.
        tokens (`list[list[int]]`): the emitted tokens, one for each node of the path; the last one has no slot yet.
        num_draft_tokens (`list[int]`): how many of the tokens were drafted.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    num_draft_tokens: list[int]

    @property
    def counts(self) -> list[int]:
        """Emitted tokens of each row."""
        return [len(tokens) for tokens in self.tokens]


def verify(tree: CandidateTree, logits: torch.Tensor, selector: BatchSelector) -> Verification:
    """
    Walks the trees and emits tokens through `selector`.

    Args:
        tree (`CandidateTree`): a tree of N nodes for each running row of the selector.
        logits (`torch.Tensor` of shape `[B, N, V]`): the target's, at each node.
        selector (`BatchSelector`): chooses and emits.
    """
    if selector.is_plain_argmax:
        return _verify_argmax(tree, logits, selector)
    return _verify_in_sequence(tree, logits, selector)


def accepted_by_argmax(tree: CandidateTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The accepted path of greedy decoding, without reading anything back from the device.

    Args:
        tree (`CandidateTree`): a batch of trees.
        logits (`torch.Tensor` of shape `[B, N, V]`): the target's, at each node.

    Returns:
        `torch.LongTensor` of shape `[B, N]`: the target's choice at each node; and `torch.BoolTensor` of shape
        `[B, N]`: true at the root and at accepted nodes.
    """
    choices = _argmax(logits)
    # At most one of a node's children carries its choice, because siblings differ in their tokens.
    return choices, tree.path(tree.tokens == choices.gather(1, tree.parents))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    # In float32 as in `generate`: a tie that arises in float32 is resolved there. Lower precisions make no new tie.
    return (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1)


def _verify_argmax(tree: CandidateTree, logits: torch.Tensor, selector: BatchSelector) -> Verification:
    if logits.shape[1] == 1:
        choice_lists = _argmax(logits).tolist()
        accepted_lists = [[0]] * len(choice_lists)
    else:
        choices, accepted = accepted_by_argmax(tree, logits)
        numbered = torch.arange(accepted.shape[1], device=accepted.device)
        # One read-back a round. Flat order makes an increasing list of nodes a path.
        accepted_lists, choice_lists = torch.stack([torch.where(accepted, numbered, -1), choices]).tolist()
    result = Verification([], [], [])
    for group, (place,), _ in selector.groups():
        nodes = [node for node in accepted_lists[place] if node >= 0]
        tokens = [choice_lists[place][node] for node in nodes]
        count = group.extend(tokens, logits[place], nodes)
        result.paths.append(nodes[:count])
        result.tokens.append(tokens[:count])
        result.num_draft_tokens.append(min(len(nodes) - 1, count))
    return result


def _verify_in_sequence(tree: CandidateTree, logits: torch.Tensor, selector: BatchSelector) -> Verification:
    tokens, parents = torch.stack([tree.tokens, tree.parents]).tolist()
    children = [
        {(parents[place][node], tokens[place][node]): node for node in range(1, len(tokens[place]))}
        for place in range(len(tokens))
    ]
    result = Verification([[] for _ in tokens], [[] for _ in tokens], [0] * len(tokens))
    for group, places, rows in selector.groups():
        _walk(group, places, rows, children, logits, selector.keeps_ended_rows, result)
    return result


def _walk(
    group: TokenSelector,
    places: list[int],
    rows: list[int],
    children: list[dict[tuple[int, int], int]],
    logits: torch.Tensor,
    keeps_ended_rows: bool,
    result: Verification,
) -> None:
    """Walks the trees of one group's rows in step, until a row leaves its tree."""
    nodes = dict.fromkeys(places, 0)
    row_of = dict(zip(places, rows, strict=True))
    while True:
        walking = list(nodes)
        chosen = group.select(logits[walking, list(nodes.values())], [row_of[place] for place in walking])
        left_tree = False
        for place in walking:
            node, token = nodes[place], chosen[row_of[place]]
            result.paths[place].append(node)
            result.tokens[place].append(token)
            child = children[place].get((node, token))
            result.num_draft_tokens[place] += child is not None
            if group.ended[row_of[place]] and not keeps_ended_rows:
                del nodes[place]
            elif child is None:
                left_tree = True
            else:
                nodes[place] = child
        if group.finished or left_tree:
            return


__all__ = ["Verification", "accepted_by_argmax", "verify"]
