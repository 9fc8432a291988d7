"""Targets with recurrent or convolutional layers generate with a draft what they generate alone.

Kernels of these layers compute in float32 whatever the model's dtype, so logits of a tree agree with those of
token-by-token decoding to about 1e-6, and tokens agree unless two logits are that close.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from statistics import mean
from typing import Any

import pytest
import tiny
import torch
from family_drafts import FamilyPair, family_pair
from recurrent_families import RECURRENT_FAMILIES
from test_family_verification import largest_difference
from thinning import thinned
from transformers import set_seed

from msd_hf import MSDDraftModel, MSDUnsupportedError
from msd_hf.compat import CACHE_NAME
from msd_hf.recurrent import kernels
from msd_hf.recurrent.layer import RecurrentLayer
from msd_hf.target.layer_kinds import KEEPS_STATES


pytestmark = pytest.mark.skipif(not KEEPS_STATES, reason="transformers 5.17 is the first whose layers keep states so")

NUM_TOKENS = 20
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20}
GREEDY = {"do_sample": False}
MODES = {"greedy": GREEDY, "sampling": SAMPLING}
PLACES = ("first", "middle", "last")
WITH_CONVOLUTION_AND_STATE = ("qwen3_5", "falcon_h1", "nemotron_h", "jamba", "kimi_linear", "lfm2_vl")
# A logit is about 10, and kernels compute in float32.
TOLERANCE = 2e-4


def both(name: str, inputs: dict[str, Any], **options: Any) -> tuple[list, list, Any]:
    """Tokens of the target alone and with its draft, and all outputs of the latter."""
    pair = family_pair(name)
    options = {"max_new_tokens": NUM_TOKENS, **options}
    set_seed(0)
    expected = pair.target.generate(**inputs, **options)
    set_seed(0)
    output = pair.target.generate(**inputs, **options, assistant_model=pair.draft, return_dict_in_generate=True)
    return expected.tolist(), output.sequences.tolist(), output


@thinned("name,mode", product(RECURRENT_FAMILIES, ("greedy", "sampling")), strength=1)
def test_tokens_are_those_of_the_target_alone(name, mode):
    family = RECURRENT_FAMILIES[name]
    accepted = []
    for seed, place in enumerate(PLACES):
        expected, tokens, output = both(
            name, family.inputs(seed, seed if family.has_images else 0, place), **MODES[mode]
        )
        assert tokens == expected
        accepted += [length for row in output.acceptance_lengths for length in row]
    assert mean(accepted) > 1.05  # else the states behind accepted paths were never used


# The other way round than above: each family is tried in both modes.
@thinned("name,mode", product(RECURRENT_FAMILIES, ("sampling", "greedy")), strength=1)
def test_rows_of_different_lengths(name, mode):
    """Rows are padded on the left, accept different numbers of tokens, and end at different steps."""
    family = RECURRENT_FAMILIES[name]
    images = (1, 0, 2) if family.has_images else (0, 0, 0)
    prompts = [family.prompt(seed, images[seed], PLACES[seed], num_text=(9, 4, 6)[seed]) for seed in range(3)]
    inputs = family.collate(prompts)
    set_seed(0)
    alone = family_pair(name).target.generate(**inputs, **MODES[mode], max_new_tokens=NUM_TOKENS)
    end = int(alone[0, inputs["input_ids"].shape[1] + NUM_TOKENS // 2])
    expected, tokens, _ = both(name, inputs, **MODES[mode], eos_token_id=end)
    assert tokens == expected


@thinned("name,rows", product(RECURRENT_FAMILIES, (1, 3)), strength=1)
def test_logits_of_random_trees(name, rows):
    """Three rounds with random trees and random accepted paths against token-by-token decoding."""
    family = RECURRENT_FAMILIES[name]
    images = (0, 1, 2) if family.has_images else (0, 0, 0)
    prompts = [
        family.prompt(seed, images[seed], PLACES[seed], num_text=(12, 8, 5)[seed], first_size=0)
        for seed in range(3 - rows, 3)
    ]
    assert largest_difference(family_pair(name).target, family.collate(prompts), seed=rows) < TOLERANCE


@thinned("name,length", product(WITH_CONVOLUTION_AND_STATE, (1, 2, 3)), strength=1)
def test_prompts_shorter_than_a_convolution(name, length):
    expected, tokens, _ = both(name, RECURRENT_FAMILIES[name].inputs(length, num_text=length), **GREEDY)
    assert tokens == expected


@pytest.mark.parametrize("name", RECURRENT_FAMILIES)
def test_a_returned_cache_goes_on_with_and_without_the_draft(name):
    """The cache that a call with the draft returns is that of the target alone: either continues from it."""
    family, pair, rows = RECURRENT_FAMILIES[name], family_pair(name), 2
    inputs = family.collate([family.prompt(seed, num_text=8 - 2 * seed) for seed in range(rows)])
    more = torch.tensor([[5, 9, 7]] * rows)
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, **GREEDY}
    answers = []
    for first, second in ((None, None), (pair.draft, None), (None, pair.draft), (pair.draft, pair.draft)):
        output = pair.target.generate(**inputs, **options, assistant_model=first)
        ids = torch.cat([output.sequences, more], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, ids.shape[1] - inputs["input_ids"].shape[1])], 1)
        cache = output[CACHE_NAME]
        final = pair.target.generate(
            ids, attention_mask=mask.long(), **options, **{CACHE_NAME: cache}, assistant_model=second
        )
        answers.append(final.sequences.tolist())
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("name", WITH_CONVOLUTION_AND_STATE)
def test_chats_over_turns(name):
    family, pair = RECURRENT_FAMILIES[name], family_pair(name)
    caches: dict[bool, Any] = {}
    ids = family.inputs(3, num_text=6)["input_ids"]
    for turn in range(3):
        texts = {}
        for drafts in (False, True):
            output = pair.target.generate(
                ids,
                max_new_tokens=7 + turn,
                return_dict_in_generate=True,
                assistant_model=pair.draft if drafts else None,
                **GREEDY,
                **({CACHE_NAME: caches[drafts]} if caches else {}),
            )
            texts[drafts] = output
        caches = {drafts: texts[drafts][CACHE_NAME] for drafts in texts}
        assert texts[True].sequences.tolist() == texts[False].sequences.tolist()
        ids = torch.cat([texts[True].sequences, torch.tensor([[11 + turn, 8]])], dim=1)


@thinned("name,nodes", product(WITH_CONVOLUTION_AND_STATE, (1, 2)), strength=1)
def test_bare_roots_and_the_smallest_trees(name, nodes, monkeypatch):
    settings = family_pair(name).draft.generation_config
    monkeypatch.setattr(settings, "num_assistant_tokens", nodes)
    monkeypatch.setattr(settings, "tree_depth", 1)
    expected, tokens, _ = both(name, RECURRENT_FAMILIES[name].inputs(5), **GREEDY)
    assert tokens == expected


# Jamba is left out: transformers reads several tokens behind a filled cache as if its states were zero, so that the
# text depends on how it is cut.
@thinned(
    "name,rows,fails_at", product([name for name in WITH_CONVOLUTION_AND_STATE if name != "jamba"], (1, 2), (1, 3))
)
def test_an_exception_leaves_a_cache_that_goes_on(name, rows, fails_at):
    """A user's cache is as some earlier moment of the call had it: what it holds is the text up to its length."""
    family, pair = RECURRENT_FAMILIES[name], family_pair(name)
    inputs = family.collate([family.prompt(seed, num_text=6) for seed in range(rows)])
    options = {"return_dict_in_generate": True, **GREEDY}
    start = pair.target.generate(**inputs, max_new_tokens=4, **options)
    cache, ids = start[CACHE_NAME], torch.cat([start.sequences, torch.tensor([[5, 9]] * rows)], dim=1)
    whole = pair.target.generate(**inputs, max_new_tokens=4, **options)[CACHE_NAME]
    final = pair.target.generate(ids, max_new_tokens=14, **GREEDY, **{CACHE_NAME: whole})

    forwards = 0

    def fail(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == fails_at + 1:
            raise RuntimeError("interrupted")

    layers = pair.target.get_decoder().layers
    handle = layers[len(layers) - 2].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="interrupted"):
            pair.target.generate(ids, max_new_tokens=14, **GREEDY, **{CACHE_NAME: cache}, assistant_model=pair.draft)
    finally:
        handle.remove()
    held = cache.get_seq_length()
    assert held >= start.sequences.shape[1] - 1
    known = final[:, : max(held + 1, ids.shape[1])]
    rest = pair.target.generate(known, max_new_tokens=final.shape[1] - known.shape[1], **GREEDY, **{CACHE_NAME: cache})
    assert rest.tolist() == final.tolist()


@pytest.mark.parametrize("name", WITH_CONVOLUTION_AND_STATE)
def test_states_that_do_not_follow_the_path_are_noticed(name, monkeypatch):
    """The control: without the states behind the accepted path, tokens differ."""

    def left_out(self: RecurrentLayer, *args: Any) -> None:
        self.drop()

    monkeypatch.setattr(RecurrentLayer, "advance", left_out)
    differing = 0
    for seed in range(3):
        expected, tokens, _ = both(name, RECURRENT_FAMILIES[name].inputs(seed), **GREEDY)
        differing += tokens != expected
    assert differing


def test_an_unknown_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_KERNELS", {"causal_conv1d_fn": kernels._KERNELS["causal_conv1d_fn"]})
    kernels.restore_kernels()
    pair = fresh_pair("qwen3_5_text")
    with pytest.raises(MSDUnsupportedError, match="do not run with functions that can follow a candidate tree"):
        pair.target.generate(**pair.family.inputs(0), max_new_tokens=8, assistant_model=pair.draft)


def fresh_pair(name: str) -> FamilyPair:
    family = RECURRENT_FAMILIES[name]
    target = family.build()
    return FamilyPair(family, target, tiny.sized(MSDDraftModel.from_target(target)))


@pytest.mark.parametrize("name", WITH_CONVOLUTION_AND_STATE)
def test_states_and_attentions_that_are_returned(name):
    pair = family_pair(name)
    inputs = pair.family.inputs(1, int(pair.family.has_images))
    flags = {"output_hidden_states": True, "output_attentions": True, "output_logits": True}
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, **GREEDY, **flags}
    before = pair.family.attentions[0]
    pair.target.set_attn_implementation("eager")
    try:
        expected = pair.target.generate(**inputs, **options)
        output = pair.target.generate(**inputs, **options, assistant_model=pair.draft)
    finally:
        pair.target.set_attn_implementation(before)
    for field in ("hidden_states", "attentions"):
        for got, step in zip(output[field], expected[field], strict=True):
            for state, other in zip(got, step, strict=True):
                assert state.shape == other.shape and torch.allclose(state, other, atol=1e-3)
    assert all(
        torch.allclose(got, other, atol=1e-3) for got, other in zip(output.logits, expected.logits, strict=True)
    )


@pytest.mark.parametrize("name", WITH_CONVOLUTION_AND_STATE)
def test_automatic_trees_and_repetitions(name, monkeypatch):
    settings = family_pair(name).draft.generation_config
    monkeypatch.setattr(settings, "num_assistant_tokens", "auto")
    monkeypatch.setattr(settings, "suffix_nodes", 4, raising=False)
    for seed in range(2):
        expected, tokens, _ = both(name, RECURRENT_FAMILIES[name].inputs(seed), **GREEDY, max_new_tokens=40)
        assert tokens == expected


def test_threads_share_a_target():
    """Calls with the draft, with another draft and without one, at the same time: what one call's tree makes of a
    layer's functions is seen by no other."""
    pair = family_pair("qwen3_5")
    other = tiny.sized(MSDDraftModel.from_target(pair.target))
    inputs = [pair.family.inputs(seed, seed % 2) for seed in range(4)]
    expected = [pair.target.generate(**one, max_new_tokens=NUM_TOKENS, **GREEDY).tolist() for one in inputs]

    def call(number: int) -> bool:
        draft = (pair.draft, None, other)[number % 3]
        output = pair.target.generate(**inputs[number % 4], max_new_tokens=NUM_TOKENS, **GREEDY, assistant_model=draft)
        return output.tolist() == expected[number % 4]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(24)))
