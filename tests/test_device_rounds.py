"""Greedy calls with `compile=True` give the tokens of the target alone, whether device or host drives the rounds."""

from __future__ import annotations

import contextlib
import weakref
from itertools import product

import pytest
import tiny
import torch
from families import FAMILIES
from family_drafts import family_pair
from thinning import thinned
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from msd_hf.attention import split as split_attention
from msd_hf.attention.split import find_live_slots
from msd_hf.compat import CACHE_NAME, holds_nothing
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import loop as generation
from msd_hf.decoding import pair as pair_states
from msd_hf.decoding.device_rounds import DeviceRounds
from msd_hf.drafting import fixed as static_drafting
from msd_hf.kv import fixed as static_cache


@pytest.fixture(autouse=True)
def rounds(monkeypatch):
    """Lists the calls that `DeviceRounds` served. Functions run uncompiled: the tests check inputs and outputs."""
    served = []

    class Counted(DeviceRounds):
        def run(self):
            served.append(self)
            super().run()

    monkeypatch.setattr(generation, "DeviceRounds", Counted)
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())  # no compiled state of an earlier test
    return served


@contextlib.contextmanager
def compilation(draft):
    draft.generation_config.compile = True
    try:
        yield
    finally:
        draft.generation_config.compile = None


def generate_both(target, draft, inputs, **options):
    """The outputs of the target alone and with the draft."""
    options = {"max_new_tokens": 30, **options}
    expected = target.generate(**inputs, **options)
    with compilation(draft):
        return expected, target.generate(**inputs, **options, assistant_model=draft)


@thinned(
    "name,attention,returns_dict",
    [
        (name, attention, returns_dict)
        for name, family in FAMILIES.items()
        if family.compiles
        for attention in family.attentions
        for returns_dict in (False, True)
    ],
)
def test_every_family(name, attention, returns_dict, rounds, monkeypatch):
    """With and without a returned cache. The buffers start so small that they must grow."""
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 16)
    # For each attention to buffers: whether it was given live slots that cover the mask.
    is_covered, is_draft_covered = [], []

    def recording_attention(is_covered):
        def attend_and_record(queries, keys, values, mask, scale, live_slots=None):
            first, end = find_live_slots(mask).tolist()
            is_covered.append(live_slots is not None and live_slots[0] <= first and end <= live_slots[1])
            return attend(queries, keys, values, mask, scale, live_slots)

        return attend_and_record

    attend = split_attention.split_attention
    monkeypatch.setattr(split_attention, "split_attention", recording_attention(is_covered))
    monkeypatch.setattr(static_drafting, "split_attention", recording_attention(is_draft_covered))
    pair = family_pair(name)
    before = pair.family.attentions[0]
    pair.target.set_attn_implementation(attention)
    try:
        for seed, num_images in enumerate((0, 1) if pair.family.has_images else (0, 0)):
            inputs = pair.family.inputs(seed, num_images)
            expected, got = generate_both(pair.target, pair.draft, inputs, return_dict_in_generate=returns_dict)
            if returns_dict:
                assert torch.equal(got.sequences, expected.sequences)
                assert sum(got.acceptance_lengths[0]) == 29
                for layer, alone in zip(got[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
                    if holds_nothing(alone):
                        continue
                    window = alone.keys.shape[2]  # a sliding layer holds only its window
                    # Eager attention computes its softmax in float32.
                    torch.testing.assert_close(layer.keys[:, :, -window:], alone.keys, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(got, expected)
    finally:
        pair.target.set_attn_implementation(before)
    assert len(rounds) == 2
    assert all(is_covered) and bool(is_covered) == (attention == "sdpa")
    assert all(is_draft_covered) and is_draft_covered


@thinned("number,seed", product(range(4), range(4)), strength=1)
def test_generation_ends_where_the_target_alone_ends(number, seed, rounds):
    pair = tiny.pair(number)
    draft = pair.with_tree(12, 3, 4)
    inputs = tiny.make_prompt(seed, 6 + seed, (1,), padding=3 * (seed % 2))
    alone = pair.target.generate(**inputs, max_new_tokens=30)
    length = inputs["input_ids"].shape[1]
    for place in (0, 1, 2, 5, 11, 12, 13):
        for options in (
            {"eos_token_id": int(alone[0, length + place])},
            {"max_new_tokens": place + 1},
            {"stopping_criteria": StoppingCriteriaList([StopAtLength(length + place + 1)])},
        ):
            expected, got = generate_both(pair.target, draft, inputs, **options)
            assert torch.equal(got, expected)
    assert len(rounds) > 10  # calls that end with their first token need no rounds


class StopAtLength(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_conversation(rounds):
    """After each turn the draft's memory equals the one that host rounds leave, so the next turn continues from it."""
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    caches = [DynamicCache(config=pair.target.config.get_text_config()) for _ in range(3)]
    ids = tiny.make_prompt(4, 6)["input_ids"]
    options = {"max_new_tokens": 12, "return_dict_in_generate": True}
    for turn in range(4):
        # Older releases take tokens of the padding id for padding if there is no mask.
        options["attention_mask"] = torch.ones_like(ids)
        expected = pair.target.generate(ids, **options, **{CACHE_NAME: caches[0]}).sequences
        with compilation(draft):
            got = pair.target.generate(ids, **options, assistant_model=draft, **{CACHE_NAME: caches[1]})
        by_host = pair.target.generate(ids, **options, assistant_model=draft, **{CACHE_NAME: caches[2]})
        assert torch.equal(got.sequences, expected)
        assert got.acceptance_lengths[0][:-1] == by_host.acceptance_lengths[0][:-1]
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        ours, theirs = (cache._msd_draft_memory for cache in caches[1:])
        assert ours.rows == theirs.rows
        for layer, wanted in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            torch.testing.assert_close(layer.keys, wanted.keys)
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
        ids = torch.cat([expected, tiny.make_prompt(10 + turn, 5)["input_ids"]], dim=1)
    assert len(rounds) == 4


def test_suffix_branches_are_left_to_the_host(rounds):
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    draft.generation_config.suffix_nodes = 4
    try:
        expected, got = generate_both(pair.target, draft, tiny.make_prompt(0, 8))
    finally:
        draft.generation_config.suffix_nodes = None
    assert torch.equal(got, expected) and not rounds


def test_rounds_equal_those_of_the_host(rounds):
    """Equal trees are accepted equally far in every round."""
    pair = tiny.pair(3)
    draft = pair.with_tree(12, 3, 4)
    for seed in range(4):
        inputs = tiny.make_prompt(seed, 8)
        options = {"max_new_tokens": 40, "return_dict_in_generate": True, "assistant_model": draft}
        expected = pair.target.generate(**inputs, **options)
        with compilation(draft):
            got = pair.target.generate(**inputs, **options)
        assert got.acceptance_lengths[0][:-1] == expected.acceptance_lengths[0][:-1]
    assert len(rounds) == 4


class RoundStreamer:
    def __init__(self, fails_after=None):
        self.tokens, self.drafted, self.fails_after = [], [], fails_after

    def put(self, tokens):
        pass  # the prompt

    def put_verified(self, tokens, num_draft_tokens):
        self.tokens += tokens.tolist()
        self.drafted.append(num_draft_tokens)
        if self.fails_after is not None and len(self.tokens) > self.fails_after:
            raise KeyError("of the user")

    def end(self):
        pass


def test_tokens_are_streamed_round_by_round(rounds):
    pair = tiny.pair(3)
    draft = pair.with_tree(12, 3, 4)
    inputs = tiny.make_prompt(0, 8)
    streams = []
    for is_compiled in (False, True):
        streams.append(RoundStreamer())
        with compilation(draft) if is_compiled else contextlib.nullcontext():
            out = pair.target.generate(**inputs, max_new_tokens=30, assistant_model=draft, streamer=streams[-1])
        assert streams[-1].tokens == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert streams[0].drafted[:-1] == streams[1].drafted[:-1] and len(rounds) == 1


def test_the_cache_of_an_interrupted_call_can_be_used(rounds):
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    ids = tiny.make_prompt(4, 6)["input_ids"]
    cache = DynamicCache(config=pair.target.config.get_text_config())
    streamer = RoundStreamer(fails_after=6)
    with compilation(draft), pytest.raises(KeyError):
        pair.target.generate(ids, assistant_model=draft, streamer=streamer, **{CACHE_NAME: cache})
    assert ids.shape[1] + 4 <= cache.get_seq_length() <= ids.shape[1] + len(streamer.tokens)
    ids = torch.cat([ids, torch.tensor([streamer.tokens])], dim=1)
    expected = pair.target.generate(ids, max_new_tokens=10)
    assert torch.equal(pair.target.generate(ids, max_new_tokens=10, **{CACHE_NAME: cache}), expected)
    assert len(rounds) == 1


class TokenStreamer:
    def __init__(self, fails_after):
        self.tokens, self.fails_after = [], fails_after

    def put(self, tokens):
        if tokens.ndim < 2:  # the prompt has two dimensions
            self.tokens += tokens.tolist()
        if len(self.tokens) > self.fails_after:
            raise KeyError("of the user")

    def end(self):
        pass


@pytest.mark.parametrize("fails_after", range(2, 12))
def test_the_cache_of_an_interrupted_call_holds_only_streamed_tokens(fails_after, rounds):
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    ids = tiny.make_prompt(4, 6)["input_ids"]
    cache = DynamicCache(config=pair.target.config.get_text_config())
    streamer = TokenStreamer(fails_after)
    with compilation(draft), pytest.raises(KeyError):
        pair.target.generate(ids, assistant_model=draft, streamer=streamer, **{CACHE_NAME: cache})
    assert cache.get_seq_length() < ids.shape[1] + len(streamer.tokens)
    ids = torch.cat([ids, torch.tensor([streamer.tokens])], dim=1)
    expected = pair.target.generate(ids, max_new_tokens=10)
    assert torch.equal(pair.target.generate(ids, max_new_tokens=10, **{CACHE_NAME: cache}), expected)


def count_calls(calls):
    return lambda module, args, output: calls.append(1)


@pytest.mark.parametrize("part", ["target", "decoder", "head", "layer"])
def test_hooks_of_the_user_run_in_every_round(part, rounds):
    """
    Device rounds would skip a hook on the target, the decoder or the head, so the host drives such calls. A hook on a
    layer runs inside the compiled code.
    """
    pair = tiny.pair(3)
    draft = pair.with_tree(12, 3, 4)
    decoder = pair.target.get_decoder()
    module = {
        "target": pair.target,
        "decoder": decoder,
        "head": pair.target.get_output_embeddings(),
        "layer": decoder.layers[0],
    }[part]
    calls = []
    handle = module.register_forward_hook(count_calls(calls))
    try:
        generate_both(pair.target, draft, tiny.make_prompt(0, 8))
    finally:
        handle.remove()
    assert calls and len(rounds) == (part == "layer")


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"repetition_penalty": 1.3},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
)
def test_calls_that_need_the_host_are_left_to_it(options, rounds):
    pair = tiny.pair(3)
    draft = pair.with_tree(12, 3, 4)
    inputs = tiny.make_prompt(0, 8)
    torch.manual_seed(0)
    expected = pair.target.generate(**inputs, max_new_tokens=20, **options)
    torch.manual_seed(0)
    with compilation(draft):
        got = pair.target.generate(**inputs, max_new_tokens=20, **options, assistant_model=draft)
    if "return_dict_in_generate" in options:
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected) and not rounds
