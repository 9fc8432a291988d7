"""Rounds of the decoding loop with an acceptance that is assumed.

A draft with random weights has no candidate accepted, so it cannot show what a good one would bring. Here every
forward and every copy of a round is done as in decoding, at the sizes of the models, and then as many nodes are
accepted as was assumed. The tokens mean nothing; only the time does.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import CACHE_NAME, keep_slots, make_in_place
from ..candidate_generator import MSDCandidateGenerator
from ..errors import MSDError
from ..modeling_msd import MSDDraftModel
from ..phases import phase
from ..targets import TargetAdapter
from ..token_selection import TokenSelector
from ..tree import TreeSettings
from ..verification import verify
from .timed_run import synchronize


def lengths_of_mean(mean: float, num_rounds: int) -> list[int]:
    """Whole numbers next to `mean`, in an order that keeps their mean near it at all times."""
    totals = [math.floor(mean * number + 0.5) for number in range(num_rounds + 1)]
    return [after - before for before, after in itertools.pairwise(totals)]


def check_assumed_length(mean: float, settings: TreeSettings) -> None:
    """
    Refuses an acceptance that no tree of these settings can have.

    Raises:
        MSDError: says what is possible.
    """
    most = min(settings.num_nodes, settings.depth + 2)
    if not 1 <= mean <= most:
        raise MSDError(f"--assume-tau {mean} is not possible: with this tree tau lies between 1 and {most}.")


def simulated_rounds(
    target: PreTrainedModel, draft: MSDDraftModel, inputs: Mapping[str, Any], lengths: Sequence[int]
) -> float:
    """
    Runs one round for each of `lengths`, in which that many tokens are taken for emitted.

    Args:
        target (`PreTrainedModel`): must not end an answer by itself.
        draft (`MSDDraftModel`): its `generation_config` sets the size of the tree.
        inputs (`Mapping`): inputs of `generate` for one prompt.
        lengths (`Sequence[int]`): tokens emitted by each round, at most the levels of the tree.

    Returns:
        `float`: seconds of all rounds, without the prefill.
    """
    seconds = []

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        settings = TreeSettings.from_generation_config(draft.generation_config)
        selector = TokenSelector(input_ids, logits_processor, stopping_criteria, generation_config)
        adapter = TargetAdapter(target, draft.config.target_layers)
        cache = model_kwargs[CACHE_NAME]
        max_slots = generation_config.max_length + settings.num_nodes
        make_in_place(cache, max_slots)
        prefill = adapter.prefill(input_ids, generation_config, model_kwargs)
        tokens = prefill.logits.argmax(-1, keepdim=True)
        generator = MSDCandidateGenerator(draft, adapter, max_slots + settings.depth * settings.top_k)
        generator.prefill(prefill, tokens[:, -1])
        next_position, prompt_mask = prefill.next_position, prefill.prompt_mask
        del prefill

        synchronize(target)
        started = time.perf_counter()
        with phase("decode"):
            for length in lengths:
                with phase("tree"):
                    tree = generator.propose(tokens[:, -1], settings)
                num_slots = cache.get_seq_length()
                logits, hidden_states = adapter.verify(tree, cache, next_position, prompt_mask)
                with phase("verification"):
                    verify(tree, logits, selector)  # for what it costs: what it accepts is not used
                # Spread over the tree as a path is, from level to level.
                path = torch.linspace(0, tree.tokens.shape[1] - 1, length, device=tree.tokens.device).long()[None]
                with phase("cache"):
                    keep_slots(cache, num_slots, path)
                bonus = logits[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tree.tokens.gather(1, path[:, 1:]), bonus], dim=1)
                next_position = next_position + length
                generator.accept(tokens, hidden_states[:, path[0]])
        synchronize(target)
        seconds.append(time.perf_counter() - started)
        return input_ids

    with torch.no_grad():
        # `generate` prepares everything as for the real loop. The selector needs room for what it emits.
        room = len(lengths) * (max(lengths) + 1) + 1
        target.generate(**inputs, max_new_tokens=room, do_sample=False, custom_generate=decode)
    return seconds[0]


__all__ = ["check_assumed_length", "lengths_of_mean", "simulated_rounds"]
