"""What the verification of a tree costs, by its number of nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import CACHE_NAME, make_in_place, truncate
from ..targets import TargetAdapter
from ..tree import CandidateTree
from .timed_run import synchronize


def verification_seconds(
    target: PreTrainedModel, inputs: Mapping[str, Any], nodes: Sequence[int], repeats: int
) -> dict[int, list[float]]:
    """
    Times verification forwards after one prompt, the sizes in turns.

    Args:
        target (`PreTrainedModel`): the target.
        inputs (`Mapping`): inputs of `generate` for the prompt.
        nodes (`Sequence[int]`): nodes of the trees, the root included.
        repeats (`int`): forwards of each size, after one that does not count.

    Returns:
        `dict[int, list[float]]`: seconds of each forward, by number of nodes.
    """
    seconds: dict[int, list[float]] = {number: [] for number in nodes}

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        adapter = TargetAdapter(target)
        cache = model_kwargs[CACHE_NAME]
        make_in_place(cache, input_ids.shape[1] + max(nodes))
        prefill = adapter.prefill(input_ids, generation_config, model_kwargs)
        num_slots = cache.get_seq_length()
        trees = {number: _binary_tree(number, input_ids) for number in nodes}
        for repeat in range(repeats + 1):
            for number, tree in trees.items():
                synchronize(target)
                started = time.perf_counter()
                adapter.verify(tree, cache, prefill.next_position, prefill.prompt_mask)
                synchronize(target)
                if repeat:
                    seconds[number].append(time.perf_counter() - started)
                truncate(cache, num_slots)
        return input_ids

    with torch.no_grad():
        target.generate(**inputs, max_new_tokens=1, do_sample=False, custom_generate=decode)
    return seconds


def _binary_tree(num_nodes: int, input_ids: torch.Tensor) -> CandidateTree:
    """A tree with two children a node, all of the token that ends the prompt."""
    numbers = torch.arange(num_nodes, device=input_ids.device)
    parents = ((numbers - 1) // 2).clamp(min=0).unsqueeze(0)
    tokens = input_ids[:, -1:].expand(-1, num_nodes).clone()
    return CandidateTree.from_parents(tokens, parents, max_depth=num_nodes.bit_length() - 1)


__all__ = ["verification_seconds"]
