"""`compile=True` where buffers and tables end, and where a forward fails."""

from __future__ import annotations

import weakref

import pytest
import tiny
import torch
from transformers import DynamicCache

from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import pair as pair_states
from msd_hf.kv import fixed as static_cache


WORD = 7


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """What is compiled runs as it is: here it is about what goes in and out."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())  # nothing compiled is kept


def one_word_pair(num_nodes: int, depth: int, top_k: int = 1, suffix_nodes: int = 0) -> tiny.Pair:
    """A target that always says the same word, and a draft with its head: every round is as long as it can be."""
    target = tiny.build_target(num_layers=1)
    old = target.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()[WORD] = 1e3
    target.set_output_embeddings(head)
    pair = tiny.Pair(target, tiny.build_draft(target), fitted=True)
    pair.with_tree(num_nodes, depth, top_k).generation_config.suffix_nodes = suffix_nodes
    return pair


def prompt_of(length: int) -> dict[str, torch.Tensor]:
    ids = tiny.make_prompt(length, length)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_caches_agree(cache, expected) -> None:
    assert cache.get_seq_length() == expected.get_seq_length()
    for layer, reference in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, reference.keys)
        torch.testing.assert_close(layer.values, reference.values)


# Errors.


class OfTheUserError(Exception):
    pass


@pytest.mark.parametrize("suffix_nodes", [0, 4], ids=["rounds of the device", "rounds of the host"])
def test_an_error_in_a_compiled_forward_leaves_the_attention_of_the_target(suffix_nodes):
    target = tiny.build_target(seed=3)
    pair = tiny.Pair(target, tiny.build_draft(target), fitted=False)
    draft = pair.with_tree(12, 3, 4)
    draft.generation_config.suffix_nodes, draft.generation_config.compile = suffix_nodes, True
    inputs = tiny.make_prompt(0, 8)
    expected = target.generate(**inputs, max_new_tokens=20)
    num_forwards = 0

    def fail(module, args, kwargs):
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards == 3:  # behind the prompt and the first tree
            raise OfTheUserError

    handle = target.get_decoder().layers[1].register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(OfTheUserError):
            target.generate(**inputs, max_new_tokens=20, assistant_model=draft)
    finally:
        handle.remove()
    assert target.get_decoder().config._attn_implementation == "sdpa"
    assert torch.equal(target.generate(**inputs, max_new_tokens=20), expected)
    assert torch.equal(target.generate(**inputs, max_new_tokens=20, assistant_model=draft), expected)


# Tables of rotations.


def test_positions_may_go_beyond_the_first_rotations():
    """These are made for 1024 positions, of which the host knows how many are taken."""
    pair = one_word_pair(num_nodes=4, depth=2, suffix_nodes=60)
    inputs = prompt_of(400)
    output = pair.target.generate(
        **inputs, max_new_tokens=700, assistant_model=pair.draft, return_dict_in_generate=True
    )
    assert output.sequences[0, 400:].tolist() == [WORD] * 700
    assert len(output.acceptance_lengths[0]) < 20


def test_a_long_answer_of_the_device_is_fed_at_its_end():
    """At positions that the host has not seen go by."""
    pair = one_word_pair(num_nodes=48, depth=46)
    pair.draft.generation_config.compile = True
    inputs = prompt_of(5)
    output = pair.target.generate(
        **inputs, max_new_tokens=1100, assistant_model=pair.draft, return_dict_in_generate=True
    )
    assert output.sequences[0, 5:].tolist() == [WORD] * 1100
    memory = output[CACHE_NAME]._msd_draft_memory
    assert memory.rows == list(range(1104))


@pytest.mark.parametrize("do_sample", [False, True], ids=["rounds of the device", "rounds of the host"])
@pytest.mark.parametrize(
    "length, tree",
    [(37, (6, 4, 1)), (51, (6, 4, 1)), (50, (31, 3, 10)), (51, (31, 3, 10))],
    ids=str,
)
def test_a_draft_that_joins_late_gets_rotations_for_all_positions(length, tree, do_sample, monkeypatch):
    """It holds so few slots that their number says nothing of positions. With the wide tree, the target's buffers have
    room for more positions than the draft has rotations."""
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 16)
    pair = one_word_pair(*tree)
    caches = [DynamicCache(config=pair.target.config.get_text_config()) for _ in range(2)]
    ids = prompt_of(length)["input_ids"]
    for cache in caches:
        first = pair.target.generate(ids, max_new_tokens=2, **{CACHE_NAME: cache})
    pair.draft.generation_config.compile = True
    options = {"max_new_tokens": 36, "do_sample": do_sample}
    expected = pair.target.generate(first, **options, **{CACHE_NAME: caches[0]})
    got = pair.target.generate(first, **options, assistant_model=pair.draft, **{CACHE_NAME: caches[1]})
    assert torch.equal(got, expected)
    assert_caches_agree(caches[1], caches[0])


# Buffers.


@pytest.mark.parametrize("returns_cache", [False, True])
@pytest.mark.parametrize("tree", [(7, 5, 1), (3, 5, 1), (20, 1, 10)], ids=["chain", "cut chain", "wide"])
def test_no_round_writes_behind_the_buffers(tree, returns_cache, monkeypatch):
    """Wherever the end of a buffer falls in a round; trees with more nodes than a round emits, and with fewer."""
    monkeypatch.setattr(static_cache, "MIN_CAPACITY", 16)
    pair = one_word_pair(*tree)
    pair.draft.generation_config.compile = True
    for length in range(5, 21):
        inputs = prompt_of(length)
        options = {"max_new_tokens": 24, "return_dict_in_generate": True}
        if returns_cache:
            expected = pair.target.generate(**inputs, **options)
            got = pair.target.generate(**inputs, **options, assistant_model=pair.draft)
            assert torch.equal(got.sequences, expected.sequences)
            assert_caches_agree(got[CACHE_NAME], expected[CACHE_NAME])
        else:
            got = pair.target.generate(**inputs, max_new_tokens=24, assistant_model=pair.draft)
            assert got[0, length:].tolist() == [WORD] * 24
