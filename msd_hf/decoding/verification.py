"""Acceptance: a walk from the root that follows the target's choice at every node until it leaves the tree.

One rule serves greedy decoding and sampling. If the tree does not depend on the random draws, following the target's
choice samples from the target's distribution, and accepts as often as recursive rejection sampling does.
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
        paths (`list[list[int]]`): the nodes whose slots stay in the cache: the root, then accepted nodes.
        tokens (`list[list[int]]`): the emitted tokens, one for each node of the path. The last token has no slot yet.
        num_draft_tokens (`list[int]`): how many of the emitted tokens were drafted.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    num_draft_tokens: list[int]

    @property
    def counts(self) -> list[int]:
        """The number of emitted tokens of each row."""
        return [len(tokens) for tokens in self.tokens]


def verify(tree: CandidateTree, logits: torch.Tensor, selector: BatchSelector) -> Verification:
    """
    Walks the trees and emits tokens through `selector`.

    Args:
        tree (`CandidateTree`): a tree of N nodes for each running row of the selector.
        logits (`torch.Tensor` of shape `[B, N, V]`): the target's logits at each node.
        selector (`BatchSelector`): chooses and emits the tokens.
    """
    if selector.is_plain_argmax:
        return _verify_argmax(tree, logits, selector)
    return _verify_in_sequence(tree, logits, selector)


def accepted_by_argmax(tree: CandidateTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The accepted paths of greedy decoding, computed without a read-back from the device.

    Args:
        tree (`CandidateTree`): a batch of trees.
        logits (`torch.Tensor` of shape `[B, N, V]`): the target's logits at each node.

    Returns:
        `torch.LongTensor` of shape `[B, N]`: the target's choice at each node; and `torch.BoolTensor` of shape
        `[B, N]`: true at the root and at accepted nodes.
    """
    choices = _argmax(logits)
    # Siblings have different tokens, so at most one child of a node matches the target's choice.
    return choices, tree.path(tree.tokens == choices.gather(1, tree.parents))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    # `generate` takes the argmax in float32, in which float64 logits may tie. Lower precisions need no conversion.
    return (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1)


def _verify_argmax(tree: CandidateTree, logits: torch.Tensor, selector: BatchSelector) -> Verification:
    choices = _argmax(logits)
    if logits.shape[1] == 1:
        trees = [[row, [0], [0]] for row in choices.tolist()]
    else:  # one read-back per round
        trees = torch.stack([choices, tree.tokens, tree.parents], dim=1).tolist()
    result = Verification([], [], [])
    for group, (place,), _ in selector.groups():
        chosen, tokens, parents = trees[place]
        nodes = _path(chosen, tokens, parents)
        emitted = [chosen[node] for node in nodes]
        num_emitted = group.extend(emitted, logits[place], nodes)
        result.paths.append(nodes[:num_emitted])
        result.tokens.append(emitted[:num_emitted])
        result.num_draft_tokens.append(min(len(nodes) - 1, num_emitted))
    return result


def _path(choices: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    """The longest path from the root on which each node carries the target's choice at its parent. One pass finds it,
    because a parent has a smaller number than its children. The arguments are by node."""
    nodes, last = [0], 0
    for node in range(1, len(tokens)):
        if parents[node] == last and tokens[node] == choices[last]:
            nodes.append(node)
            last = node
    return nodes


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
    """Walks the trees of one group's rows in step, until a row leaves its tree or all rows have ended."""
    nodes = dict.fromkeys(places, 0)  # place -> current node
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
