"""Measures the cost of verifying a tree, by its number of nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ..draft.modeling_msd import MSDDraftModel
from ..kv.in_place import truncate
from ..tree.candidate import CandidateTree
from .intercepted_loop import LoopEnd, run_intercepted
from .timed_run import synchronize


def verification_seconds(
    target: PreTrainedModel, draft: MSDDraftModel, inputs: Mapping[str, Any], nodes: Sequence[int], repeats: int
) -> dict[int, list[float]]:
    """
    Times verifications of trees of several sizes, in turns, in place of the first verification of an answer.

    Args:
        target (`PreTrainedModel`), draft (`MSDDraftModel`): the pair; the draft's own trees are not used.
        inputs (`Mapping`): inputs of `generate` for one prompt.
        nodes (`Sequence[int]`): nodes of the trees, the root included.
        repeats (`int`): timed forwards of each size, after one that does not count.

    Returns:
        `dict[int, list[float]]`: seconds of each forward, by number of nodes.
    """
    seconds: dict[int, list[float]] = {number: [] for number in nodes}

    def on_verify(verify: Callable[[CandidateTree], Any], tree: CandidateTree, cache: Cache) -> Any:
        num_slots = cache.get_seq_length()
        trees = {number: _binary_tree(number, tree.tokens[:, :1]) for number in nodes}
        for repeat in range(repeats + 1):
            for number, other in trees.items():
                synchronize(target)
                started = time.perf_counter()
                verify(other)
                synchronize(target)
                if repeat:
                    seconds[number].append(time.perf_counter() - started)
                truncate(cache, num_slots)
        raise LoopEnd

    run_intercepted(target, draft, inputs, on_verify, max_new_tokens=max(nodes) + 2)
    return seconds


def _binary_tree(num_nodes: int, root: torch.Tensor) -> CandidateTree:
    """A binary tree of `num_nodes` nodes. All of them carry the root's token, `root` `[1, 1]`."""
    numbers = torch.arange(num_nodes, device=root.device)
    parents = ((numbers - 1) // 2).clamp(min=0).unsqueeze(0)
    return CandidateTree.from_parents(root.repeat(1, num_nodes), parents, max_depth=num_nodes.bit_length() - 1)


__all__ = ["verification_seconds"]
