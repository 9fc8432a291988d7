"""With a draft, targets of every family generate the tokens that they generate alone, exactly in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Any

import pytest
import torch
from families import FAMILIES
from family_drafts import family_pair
from thinning import thinned
from transformers import set_seed


NUM_TOKENS = 16
PLACES = ("first", "middle", "last")
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20}


@dataclass
class Case:
    """Tokens of a target alone and with a draft, and the number of tokens that each verification emitted."""

    expected: torch.Tensor
    tokens: torch.Tensor
    acceptance_lengths: list[int]


GRID = [
    (name, attention, num_images, mode)
    for name, family in FAMILIES.items()
    for attention in family.attentions
    for num_images in ((0, 1, 2) if family.has_images else (0,))
    for mode in ("greedy", "sampling")
]


def generate_both(name: str, inputs: dict[str, Any], attention: str | None = None, **options: Any) -> Case:
    pair = family_pair(name)
    before = pair.family.attentions[0]
    pair.target.set_attn_implementation(attention or before)
    options = {"max_new_tokens": NUM_TOKENS, **options}
    try:
        set_seed(0)
        expected = pair.target.generate(**inputs, **options)
        set_seed(0)
        output = pair.target.generate(**inputs, **options, assistant_model=pair.draft, return_dict_in_generate=True)
    finally:
        pair.target.set_attn_implementation(before)
    return Case(expected, output.sequences, [length for row in output.acceptance_lengths for length in row])


@functools.cache
def run(name: str, attention: str, num_images: int, mode: str) -> Case:
    number = GRID.index((name, attention, num_images, mode))
    inputs = FAMILIES[name].inputs(number, num_images, PLACES[number % 3])
    return generate_both(name, inputs, attention, **(SAMPLING if mode == "sampling" else {}))


@thinned("name,attention,num_images,mode", GRID)
def test_tokens_are_those_of_the_target_alone(name, attention, num_images, mode):
    case = run(name, attention, num_images, mode)
    assert case.tokens.tolist() == case.expected.tolist()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_videos])
@pytest.mark.parametrize(("num_images", "num_videos"), [(0, 1), (1, 2)])
def test_videos(name, num_images, num_videos):
    case = generate_both(name, FAMILIES[name].inputs(num_images, num_images, num_videos=num_videos))
    assert case.tokens.tolist() == case.expected.tolist()


@thinned("name,mode", product(FAMILIES, ("greedy", "sampling")), strength=1)
def test_rows_of_different_lengths_and_pictures(name, mode):
    """Rows have no, one or two images, are padded on the left if the family allows it, and end at different steps."""
    family = FAMILIES[name]
    images = (1, 0, 2) if family.has_images else (0, 0, 0)
    can_pad = family.attentions[0] == "sdpa" or family.eager_left_padding
    prompts = [
        family.prompt(seed, images[seed], PLACES[seed], num_text=(9, 4, 6)[seed] if can_pad else 9)
        for seed in range(3)
    ]
    inputs = family.collate(prompts)
    assert bool((inputs["attention_mask"] == 0).any()) == can_pad
    options = dict(SAMPLING) if mode == "sampling" else {}
    set_seed(0)
    alone = family_pair(name).target.generate(**inputs, **options, max_new_tokens=NUM_TOKENS)
    # A token that ends one row in the middle.
    options["eos_token_id"] = int(alone[0, inputs["input_ids"].shape[1] + NUM_TOKENS // 2])
    case = generate_both(name, inputs, **options)
    assert case.tokens.tolist() == case.expected.tolist()


def test_drafts_are_accepted():
    """If no candidate were accepted, the tests above would only check plain decoding."""
    cases = [case for case in GRID if case[1:] == (FAMILIES[case[0]].attentions[0], 0, "greedy")]
    assert mean(length for case in cases for length in run(*case).acceptance_lengths) > 1.5


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_images])
def test_targets_see_their_images(name):
    """Other images of the same size change the tokens; otherwise a loop that lost images would go unnoticed."""
    family, target = FAMILIES[name], family_pair(name).target
    prompts = [family.prompt(seed, 1, first_size=0, num_text=6) for seed in range(4)]
    for prompt in prompts:
        prompt.tokens = prompts[0].tokens
    sequences = target.generate(**family.collate(prompts), max_new_tokens=NUM_TOKENS, do_sample=False)
    assert len({tuple(row) for row in sequences.tolist()}) > 2
