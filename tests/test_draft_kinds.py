"""A draft of any kind leaves the target's output as it is, in every way of calling `generate`, on four families."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from draft_kinds import KINDS, draft_of, target_of
from families import FAMILIES, SPECIAL_TOKEN_IDS
from thinning import thinned

from msd_hf.compat import CACHE_NAME


TARGETS = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma4"]
TREE = {"num_assistant_tokens": 16, "tree_depth": 3, "tree_top_k": 4}
CHAIN = {"num_assistant_tokens": 5, "tree_depth": 3, "tree_top_k": 1}
GREEDY = {"do_sample": False, "max_new_tokens": 20}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 20}

Answers = Iterator[tuple[list[list[int]], int]]  # for each call, its sequences, and how many candidates were accepted


def answer(name: str, draft: Any, inputs: dict[str, Any], options: dict[str, Any], **more: Any) -> Any:
    """One call of `generate`, from the same seed with a draft and without one."""
    torch.manual_seed(3)
    options = {"return_dict_in_generate": True, **options, **more}
    return target_of(name).generate(**inputs, **options, assistant_model=draft)


def counted(output: Any) -> tuple[list[list[int]], int]:
    rows = getattr(output, "acceptance_lengths", [])
    return output.sequences.tolist(), sum(length - 1 for row in rows for length in row)


def single(name: str, draft: Any, options: dict[str, Any]) -> Answers:
    for num_images in (0, 2):
        yield counted(answer(name, draft, FAMILIES[name].inputs(num_images, num_images), options))


def batch(name: str, draft: Any, options: dict[str, Any]) -> Answers:
    """Rows have one, no and two images, are padded on the left, and end at different steps."""
    family = FAMILIES[name]
    shapes = [(1, 9), (0, 4), (2, 6)]
    inputs = family.collate([family.prompt(20 + n, images, num_text=text) for n, (images, text) in enumerate(shapes)])
    assert bool((inputs["attention_mask"] == 0).any())
    alone = answer(name, None, inputs, options).sequences
    eos = int(alone[0, inputs["input_ids"].shape[1] + options["max_new_tokens"] // 2])
    yield counted(answer(name, draft, inputs, options, eos_token_id=eos))


def chat(name: str, draft: Any, options: dict[str, Any]) -> Answers:
    """Turns hand on their cache; the third brings images of its own. Each turn gets the last token, which the cache
    lacks, and what is new: Qwen's models count the images of the whole text otherwise."""
    past, last, length = {}, [], 0
    for turn, num_images in enumerate((1, 0, 2)):
        prompt = FAMILIES[name].prompt(10 + turn, num_images, num_text=5)
        prompt.tokens = last + prompt.tokens
        inputs = FAMILIES[name].collate([prompt])
        inputs["attention_mask"] = torch.ones(1, length + len(prompt.tokens), dtype=torch.long)
        output = answer(name, draft, inputs, options, **past, suppress_tokens=SPECIAL_TOKEN_IDS)
        yield counted(output)
        past, last = {CACHE_NAME: output[CACHE_NAME]}, output.sequences[0, -1:].tolist()
        length = output[CACHE_NAME].get_seq_length()


def threads(name: str, draft: Any, options: dict[str, Any]) -> Answers:
    """Three threads share the target and the draft; a fourth uses the target alone."""
    calls = [(0, draft), (1, draft), (2, draft), (1, None)]

    def call(number: int) -> tuple[list[list[int]], int]:
        num_images, given = calls[number]
        return counted(answer(name, given, FAMILIES[name].inputs(number, num_images), options))

    with ThreadPoolExecutor(len(calls) if draft is not None else 1) as pool:
        yield from pool.map(call, range(len(calls)))


# Calls, their arguments, and the settings of the tree.
WAYS = {
    "greedy": (single, GREEDY, TREE),
    "sampled": (single, SAMPLED, TREE),
    "chain": (single, GREEDY, CHAIN),
    "auto": (single, {**GREEDY, "max_new_tokens": 40}, {**TREE, "num_assistant_tokens": "auto"}),
    "batch": (batch, GREEDY, TREE),
    "sampled batch": (batch, SAMPLED, CHAIN),
    "chat": (chat, {**GREEDY, "max_new_tokens": 10}, TREE),
    "threads": (threads, GREEDY, TREE),
}


@thinned("kind, name, way", product(KINDS, TARGETS, WAYS))
def test_the_output_is_that_of_the_target_alone(kind, name, way):
    calls, options, settings = WAYS[way]
    draft = draft_of(kind, name)
    draft.generation_config.update(**settings)
    expected = [sequences for sequences, _ in calls(name, None, options)]
    got, accepted = zip(*calls(name, draft, options), strict=True)
    assert list(got) == expected
    # Automatic trees depend on the machine, and may pause the draft.
    assert sum(accepted) > 0 or way == "auto"
