"""Greedy rounds of one sequence with `compile=True`: the tokens of the target alone, whoever drives the rounds."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import tiny
import torch
from families import FAMILIES
from family_drafts import family_pair
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from msd_hf.attention import split as split_attention
from msd_hf.attention.split import find_live_slots
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import loop as generation
from msd_hf.decoding import pair as pair_states
from msd_hf.decoding.device_rounds import DeviceRounds
from msd_hf.drafting import fixed as static_drafting
from msd_hf.kv import fixed as static_cache


@pytest.fixture(autouse=True)
def rounds(monkeypatch):
    """Counts calls that the device served. What is compiled runs as it is: here it is about what goes in and out."""
    served = []

    class Counted(DeviceRounds):
        def run(self):
            served.append(self)
            super().run()

    monkeypatch.setattr(generation, "DeviceRounds", Counted)
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())  # nothing compiled is kept
    return served


@contextlib.contextmanager
def compilation(draft):
    draft.generation_config.compile = True
    try:
        yield
    finally:
        draft.generation_config.compile = None


def both(target, draft, inputs, **options):
    """Tokens of the target alone, and with the draft."""
    options = {"max_new_tokens": 30, **options}
    expected = target.generate(**inputs, **options)
    with compilation(draft):
        return expected, target.generate(**inputs, **options, assistant_model=draft)


@pytest.mark.parametrize("returns_dict", [False, True])
@pytest.mark.parametrize(("name", "attention"), [(n, a) for n, family in FAMILIES.items() for a in family.attentions])
def test_every_family(name, attention, returns_dict, rounds, monkeypatch):
    """With a cache that someone may look at, and without; through buffers that become too small."""
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 16)
    told, draft_told = [], []  # of each attention to buffers, whether it was told which slots are live, and is right

    def looking(told):
        def look(queries, keys, values, mask, scale, live_slots=None):
            first, end = find_live_slots(mask).tolist()
            told.append(live_slots is not None and live_slots[0] <= first and end <= live_slots[1])
            return attend(queries, keys, values, mask, scale, live_slots)

        return look

    attend = split_attention.split_attention
    monkeypatch.setattr(split_attention, "split_attention", looking(told))
    monkeypatch.setattr(static_drafting, "split_attention", looking(draft_told))
    pair = family_pair(name)
    before = pair.family.attentions[0]
    pair.target.set_attn_implementation(attention)
    try:
        for seed, num_images in enumerate((0, 1) if pair.family.has_images else (0, 0)):
            inputs = pair.family.inputs(seed, num_images)
            expected, got = both(pair.target, pair.draft, inputs, return_dict_in_generate=returns_dict)
            if returns_dict:
                assert torch.equal(got.sequences, expected.sequences)
                assert sum(got.acceptance_lengths[0]) == 29
                for layer, alone in zip(got[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
                    window = alone.keys.shape[2]  # a sliding layer holds no more than that
                    # Eager attention has its softmax in float32.
                    torch.testing.assert_close(layer.keys[:, :, -window:], alone.keys, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(got, expected)
    finally:
        pair.target.set_attn_implementation(before)
    assert len(rounds) == 2
    assert all(told) and bool(told) == (attention == "sdpa")
    assert all(draft_told) and draft_told


@pytest.mark.parametrize("number", range(4))
def test_ends_of_all_kinds(number, rounds):
    pair = tiny.pair(number)
    draft = pair.with_tree(12, 3, 4)
    for seed in range(4):
        inputs = tiny.make_prompt(seed, 6 + seed, (1,), padding=3 * (seed % 2))
        alone = pair.target.generate(**inputs, max_new_tokens=30)
        length = inputs["input_ids"].shape[1]
        for place in (0, 1, 2, 5, 11, 12, 13):
            for options in (
                {"eos_token_id": int(alone[0, length + place])},
                {"max_new_tokens": place + 1},
                {"stopping_criteria": StoppingCriteriaList([Length(length + place + 1)])},
            ):
                expected, got = both(pair.target, draft, inputs, **options)
                assert torch.equal(got, expected)
    assert len(rounds) > 60  # the others ended with their first token


class Length(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_conversation(rounds):
    """The draft goes on where it stood, as it does without compilation."""
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    caches = [DynamicCache(config=pair.target.config.get_text_config()) for _ in range(3)]
    ids = tiny.make_prompt(4, 6)["input_ids"]
    options = {"max_new_tokens": 12, "return_dict_in_generate": True}
    for turn in range(4):
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


def test_repetitions_are_left_to_the_host(rounds):
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    draft.generation_config.suffix_nodes = 4
    try:
        expected, got = both(pair.target, draft, tiny.make_prompt(0, 8))
    finally:
        draft.generation_config.suffix_nodes = None
    assert torch.equal(got, expected) and not rounds


def test_rounds_are_those_of_the_host(rounds):
    """The same trees, the same acceptance."""
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


class Streamed:
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
        streams.append(Streamed())
        with compilation(draft) if is_compiled else contextlib.nullcontext():
            out = pair.target.generate(**inputs, max_new_tokens=30, assistant_model=draft, streamer=streams[-1])
        assert streams[-1].tokens == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert streams[0].drafted[:-1] == streams[1].drafted[:-1] and len(rounds) == 1


def test_the_cache_of_an_interrupted_call_can_be_used(rounds):
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    ids = tiny.make_prompt(4, 6)["input_ids"]
    cache = DynamicCache(config=pair.target.config.get_text_config())
    streamer = Streamed(fails_after=6)
    with compilation(draft), pytest.raises(KeyError):
        pair.target.generate(ids, assistant_model=draft, streamer=streamer, **{CACHE_NAME: cache})
    assert ids.shape[1] + 4 <= cache.get_seq_length() <= ids.shape[1] + len(streamer.tokens)
    ids = torch.cat([ids, torch.tensor([streamer.tokens])], dim=1)
    expected = pair.target.generate(ids, max_new_tokens=10)
    assert torch.equal(pair.target.generate(ids, max_new_tokens=10, **{CACHE_NAME: cache}), expected)
    assert len(rounds) == 1


class TokenByToken:
    def __init__(self, fails_after):
        self.tokens, self.fails_after = [], fails_after

    def put(self, tokens):
        if tokens.ndim < 2:  # else the prompt
            self.tokens += tokens.tolist()
        if len(self.tokens) > self.fails_after:
            raise KeyError("of the user")

    def end(self):
        pass


@pytest.mark.parametrize("fails_after", range(2, 12))
def test_the_cache_of_an_interrupted_call_holds_no_more_than_was_handed_on(fails_after, rounds):
    pair = tiny.pair(1)
    draft = pair.with_tree(12, 3, 4)
    ids = tiny.make_prompt(4, 6)["input_ids"]
    cache = DynamicCache(config=pair.target.config.get_text_config())
    streamer = TokenByToken(fails_after)
    with compilation(draft), pytest.raises(KeyError):
        pair.target.generate(ids, assistant_model=draft, streamer=streamer, **{CACHE_NAME: cache})
    assert cache.get_seq_length() < ids.shape[1] + len(streamer.tokens)
    ids = torch.cat([ids, torch.tensor([streamer.tokens])], dim=1)
    expected = pair.target.generate(ids, max_new_tokens=10)
    assert torch.equal(pair.target.generate(ids, max_new_tokens=10, **{CACHE_NAME: cache}), expected)


def count_calls(calls):
    return lambda module, args, output: calls.append(1)


@pytest.mark.parametrize("part", ["target", "decoder", "head", "layer"])
def test_hooks_of_the_user_run_each_time(part, rounds):
    """Those that compiled code does not pass over."""
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
        both(pair.target, draft, tiny.make_prompt(0, 8))
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
def test_calls_that_the_host_has_a_part_in(options, rounds):
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
