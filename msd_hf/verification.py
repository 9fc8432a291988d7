"""Verification: a walk from the root that takes the target's choice at every node until it leaves the tree.

One rule serves greedy decoding and sampling. For a tree that does not depend on the random draws, taking the target's
own choice at each node has the law of the target, and the acceptance probability of recursive rejection sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .token_selection import TokenSelector
from .tree import CandidateTree


@dataclass
class Verification:
    """What one verification forward gave.

    Args:
        path (`torch.LongTensor` of shape `[1, A]`): the nodes whose slots stay in the cache: the root, then accepted
            ones.
        tokens (`torch.LongTensor` of shape `[1, A]`): the emitted tokens; the last one has no slot yet.
        num_draft_tokens (`int`): how many of them were drafted.
    """

    path: torch.Tensor
    tokens: torch.Tensor
    num_draft_tokens: int


def verify(tree: CandidateTree, logits: torch.Tensor, selector: TokenSelector) -> Verification:
    """
    Walks the tree and emits tokens through `selector`.

    Args:
        tree (`CandidateTree`): a batch of one tree of N nodes.
        logits (`torch.Tensor` of shape `[1, N, V]`): the target's, at each node.
        selector (`TokenSelector`): chooses and emits.
    """
    if selector.is_plain_argmax:
        return _verify_argmax(tree, logits, selector)
    return _verify_in_sequence(tree, logits, selector)


def match_argmax(tree: CandidateTree, choices: torch.Tensor) -> torch.Tensor:
    """
    The accepted path, without reading anything back from the device.

    Args:
        tree (`CandidateTree`): a batch of trees.
        choices (`torch.LongTensor` of shape `[B, N]`): the target's choice at each node.

    Returns:
        `torch.BoolTensor` of shape `[B, N]`: true at the root and at accepted nodes.
    """
    matches = tree.tokens == choices.gather(1, tree.parents)
    matches[:, 0] = True
    # A node is accepted if it and all nodes above it match; siblings differ in their tokens, so this is one path.
    return (matches.unsqueeze(1) | ~tree.ancestors).all(-1)


def _verify_argmax(tree: CandidateTree, logits: torch.Tensor, selector: TokenSelector) -> Verification:
    # float32 as `generate` does: a tie that arises there is resolved there.
    choices = logits.float().argmax(-1)
    accepted = match_argmax(tree, choices)
    numbers = torch.arange(accepted.shape[1], device=accepted.device)
    # One read-back a round. Flat order makes an increasing list of nodes a path.
    accepted_list, choice_list = torch.stack([torch.where(accepted[0], numbers, -1), choices[0]]).tolist()
    nodes = [node for node in accepted_list if node >= 0]
    count = selector.extend([choice_list[node] for node in nodes], logits[0, nodes])
    return _result(tree, nodes[:count], [choice_list[node] for node in nodes[:count]], num_accepted=len(nodes) - 1)


def _verify_in_sequence(tree: CandidateTree, logits: torch.Tensor, selector: TokenSelector) -> Verification:
    tokens, parents = torch.stack([tree.tokens[0], tree.parents[0]]).tolist()
    children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    node: int | None = 0
    nodes: list[int] = []
    emitted: list[int] = []
    while node is not None:
        nodes.append(node)
        emitted.append(selector.select(logits[:, node]))
        node = children.get((node, emitted[-1]))
        if selector.finished:
            break
    return _result(tree, nodes, emitted, num_accepted=len(nodes) - (node is None))


def _result(tree: CandidateTree, nodes: list[int], tokens: list[int], num_accepted: int) -> Verification:
    device = tree.tokens.device
    return Verification(
        path=torch.tensor([nodes], device=device),
        tokens=torch.tensor([tokens], device=device),
        num_draft_tokens=min(num_accepted, len(tokens)),
    )


__all__ = ["Verification", "match_argmax", "verify"]
