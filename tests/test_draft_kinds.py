"""A draft of any kind leaves the target's output as it is, in every way of calling `generate`, on four families."""

from __future__ import annotations

import functools
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
GREEDY = {"do_sample": False, "max_new_tokens": 14}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 14}

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


@functools.cache
def ragged(name: str) -> dict[str, Any]:
    """Rows with one, no and two images, padded on the left; a token that the first row reaches ends a row."""
    family = FAMILIES[name]
    shapes = [(1, 9), (0, 4), (2, 6)]
    inputs = family.collate([family.prompt(20 + n, images, num_text=text) for n, (images, text) in enumerate(shapes)])
    assert bool((inputs["attention_mask"] == 0).any())
    length = inputs["input_ids"].shape[1]
    return {
        **inputs,
        "eos_token_id": int(answer(name, None, inputs, GREEDY, max_new_tokens=6).sequences[0, length + 5]),
    }


def batch(name: str, draft: Any, options: dict[str, Any]) -> Answers:
    """Rows end at different steps."""
    yield counted(answer(name, draft, ragged(name), options))


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
    """Two threads share the target and the draft; a third uses the target alone."""
    calls = [(0, draft), (2, draft), (1, None)]

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
    "auto": (single, {**GREEDY, "max_new_tokens": 24}, {**TREE, "num_assistant_tokens": "auto"}),
    "batch": (batch, GREEDY, TREE),
    "sampled batch": (batch, SAMPLED, CHAIN),
    "chat": (chat, {**GREEDY, "max_new_tokens": 8}, TREE),
    "threads": (threads, GREEDY, TREE),
}


@functools.cache
def alone(name: str, way: str) -> list[list[list[int]]]:
    calls, options, _ = WAYS[way]
    return [sequences for sequences, _ in calls(name, None, options)]


def drafted(kind: str, name: str, way: str) -> tuple[list[list[list[int]]], int]:
    calls, options, settings = WAYS[way]
    draft = draft_of(kind, name)
    draft.generation_config.update(**settings)
    sequences, accepted = zip(*calls(name, draft, options), strict=True)
    return list(sequences), sum(accepted)


@pytest.mark.parametrize("kind", KINDS)
def test_trees_are_accepted_in_part_and_change_nothing(kind):
    for name in TARGETS:
        sequences, accepted = drafted(kind, name, "greedy")
        assert sequences == alone(name, "greedy")
        # If no candidate were accepted, the tests would only check plain decoding.
        assert accepted > 0, name


@thinned("kind, name, way", product(KINDS, TARGETS, [way for way in WAYS if way != "greedy"]))
def test_every_way_of_calling_gives_the_output_of_the_target_alone(kind, name, way):
    sequences, _ = drafted(kind, name, way)
    assert sequences == alone(name, way)
