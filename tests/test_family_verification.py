"""One forward over a candidate tree gives the logits of token-by-token decoding, for targets of every family."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from families import FAMILIES, FIRST_TEXT_TOKEN_ID, NUM_TEXT_TOKENS, Family
from thinning import thinned
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from msd_hf.compat import CACHE_NAME
from msd_hf.decoding.running_rows import RunningRows
from msd_hf.decoding.verification import Verification
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, make_in_place
from msd_hf.target.adapter import TargetAdapter
from msd_hf.tree.candidate import CandidateTree


NUM_ROUNDS, NUM_NODES = 3, 9


def tolerance(family: Family, attention: str) -> float:
    """Logits are about 10. Eager attention of transformers computes its softmax in float32, some routers and
    rotary embeddings too."""
    return 1e-4 if attention == "eager" else 1e-5 if family.float32_parts else 1e-9


class ForcedTokens(LogitsProcessor):
    """Forces `tokens` (`[B, T]`) after a prompt of `length` tokens."""

    def __init__(self, length: int, tokens: torch.Tensor):
        self.length, self.tokens = length, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.length
        return torch.full_like(scores, float("-inf")).scatter(1, self.tokens[:, step : step + 1], 0.0)


def random_token(rng: random.Random) -> int:
    return rng.randrange(FIRST_TEXT_TOKEN_ID, FIRST_TEXT_TOKEN_ID + NUM_TEXT_TOKENS)


def decode_trees(target: PreTrainedModel, input_ids: torch.Tensor, *args: Any, rng, seen, **model_kwargs: Any):
    """A decoding method for `generate` that verifies random trees. Each row accepts a random path. Stores the tokens
    of each row, and the logits after each of them, in `seen`."""
    generation_config = args[2] if len(args) > 2 else model_kwargs.pop("generation_config")
    for name in ("logits_processor", "stopping_criteria"):
        model_kwargs.pop(name, None)
    adapter, cache = TargetAdapter(target), model_kwargs[CACHE_NAME]
    make_in_place(cache, 256, adapter.image_layers)
    prefill = adapter.prefill(input_ids, generation_config, model_kwargs)
    rows = range(len(input_ids))
    tokens = [[random_token(rng)] for _ in rows]
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    slots = CacheTransaction(cache, ContextSlots([0] * len(tokens)))
    slots.commit_prompt(prefill.prompt_mask, prefill.repeated_inputs)
    running = RunningRows(slots, prefill.next_position, [row[-1] for row in tokens])
    for number in range(NUM_ROUNDS):
        num_nodes = 1 if number % 3 == 2 else NUM_NODES  # a root alone may need no mask
        tree = CandidateTree.from_parents(
            torch.tensor([[row[-1], *[random_token(rng) for _ in range(num_nodes - 1)]] for row in tokens]),
            torch.tensor([[0, *[rng.randrange(node) for node in range(1, num_nodes)]] for _ in rows]),
            max_depth=num_nodes - 1,
        )
        verified = adapter.verify(tree, cache, running.context, running.next_position).logits
        paths = [tree.ancestors[row, rng.randrange(num_nodes)].nonzero()[:, 0].tolist() for row in rows]
        emitted = []
        for row, path in enumerate(paths):
            logits[row] += verified[row, path]
            emitted.append([*tree.tokens[row, path[1:]].tolist(), random_token(rng)])
            tokens[row] += emitted[-1]
        width = max(map(len, paths))
        running.accept(
            Verification(paths, emitted, [len(path) - 1 for path in paths]),
            torch.tensor([path + [0] * (width - len(path)) for path in paths]),
        )
        running.settle()
    seen.update(tokens=tokens, logits=logits)
    return input_ids


def largest_difference(target: PreTrainedModel, inputs: dict[str, Any], seed: int) -> float:
    """Compares the logits of trees with those of `generate` when it is forced along the accepted paths."""
    seen: dict[str, Any] = {}
    method = functools.partial(decode_trees, rng=random.Random(seed), seen=seen)
    target.generate(**inputs, max_new_tokens=1, custom_generate=method)
    length = max(map(len, seen["tokens"]))
    forced = torch.tensor([row + [FIRST_TEXT_TOKEN_ID] * (length - len(row)) for row in seen["tokens"]])
    expected: list[torch.Tensor] = []
    handle = target.register_forward_hook(lambda module, args, output: expected.append(output.logits[:, -1]))
    processors = LogitsProcessorList([ForcedTokens(inputs["input_ids"].shape[1], forced)])
    target.generate(**inputs, max_new_tokens=length, do_sample=False, logits_processor=processors)
    handle.remove()
    return max(
        float((torch.stack(logits) - torch.stack(expected)[1 : len(logits) + 1, row]).abs().max())
        for row, logits in enumerate(seen["logits"])
    )


def one_prompt(family: Family, attention: str) -> dict[str, Any]:
    return family.inputs(1, 2 if family.has_images else 0, num_text=12)


def several_rows(family: Family, attention: str) -> dict[str, Any]:
    """Rows that accept different numbers of tokens."""
    images = (0, 1, 2) if family.has_images else (0, 0, 0)
    lengths = (5, 8, 12) if attention == "sdpa" or family.eager_left_padding else (8, 8, 8)
    if len(set(lengths)) == 1:
        images = (images[1],) * 3
    prompts = [
        family.prompt(seed, count, place, num_text=length, first_size=0)
        for seed, (count, place, length) in enumerate(zip(images, ("first", "middle", "last"), lengths, strict=True))
    ]
    return family.collate(prompts)


MAKE_INPUTS = {"one prompt": one_prompt, "several rows": several_rows}
CASES = [
    (name, attention, kind)
    for name, family in FAMILIES.items()
    for attention in family.attentions
    for kind in MAKE_INPUTS
]


@thinned("name,attention,kind", CASES)
def test_logits_of_trees_are_those_of_decoding(name, attention, kind):
    family, seed = FAMILIES[name], list(MAKE_INPUTS).index(kind) + 1
    inputs = MAKE_INPUTS[kind](family, attention)
    assert largest_difference(family.build(attention=attention), inputs, seed) < tolerance(family, attention)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_videos])
def test_videos(name):
    family = FAMILIES[name]
    assert largest_difference(family.build(), family.inputs(3, 1, num_videos=2), seed=3) < tolerance(family, "sdpa")
