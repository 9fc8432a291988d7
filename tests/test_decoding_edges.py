"""Decoding where a limit, a tie, a window or an image falls into a tree, and batches that are interrupted."""

from __future__ import annotations

import contextlib
import copy
import weakref

import pytest
import tiny
import torch
from families import FAMILIES
from family_drafts import family_pair
from test_family_verification import largest_difference
from test_odd_calls import Interrupt
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from msd_hf.attention.masks import Reach, buffer_attention_mask, tree_attention_mask
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import pair as pair_states
from msd_hf.kv.slots import ContextSlots
from msd_hf.observer import observing
from msd_hf.tree.candidate import CandidateTree


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """What is compiled runs as it is: here it is about what goes in and out."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())  # nothing compiled is kept


@contextlib.contextmanager
def compilation(draft, is_compiled: bool = True):
    draft.generation_config.compile = is_compiled
    try:
        yield
    finally:
        draft.generation_config.compile = None


# Interrupted batches.


@pytest.mark.parametrize("ended_rows", ["shorter", "longer"])
def test_an_interrupted_batch_leaves_a_usable_cache(ended_rows):
    """Rows that have ended hold fewer slots than those that go on, or more: no row may be filled up with nothing."""
    pair = family_pair("llama")
    inputs = pair.family.collate([pair.family.prompt(seed, num_text=8) for seed in range(3)])
    start = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 16, "return_dict_in_generate": True}
    alone = pair.target.generate(**inputs, **options)
    rounds = pair.target.generate(**inputs, **options, assistant_model=pair.draft).acceptance_lengths
    assert len(rounds[0]) > 2 * len(rounds[1])  # the others run ahead of the first row
    eos = int(alone.sequences[0, start + 8] if ended_rows == "longer" else alone.sequences[1, start])
    cache, streamer = DynamicCache(), Interrupt(after=3 * 8)
    with pytest.raises(KeyboardInterrupt):
        pair.target.generate(
            **inputs,
            max_new_tokens=16,
            eos_token_id=eos,
            streamer=streamer,
            assistant_model=pair.draft,
            **{CACHE_NAME: cache},
        )
    length = cache.get_seq_length()
    assert start <= length <= start + 8 and (length > start) == (ended_rows == "longer")
    for layer, expected in zip(cache.layers, alone[CACHE_NAME].layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys[:, :, :length])
        torch.testing.assert_close(layer.values, expected.values[:, :, :length])
    ids = torch.cat([inputs["input_ids"], torch.tensor(streamer.tokens).view(-1, 3).T], dim=1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    expected = pair.target.generate(**given)
    assert torch.equal(pair.target.generate(**given, **{CACHE_NAME: cache}), expected)


# Windows.


def parents_of(rows: list[list[int]]) -> CandidateTree:
    parents = torch.tensor(rows)
    return CandidateTree.from_parents(torch.arange(parents.numel()).view_as(parents), parents, max_depth=5)


def visible_in_window(
    parents: list[int], length: int, num_padded: int, num_slots: int, window: int
) -> list[list[bool]]:
    """Which of the slots each node sees: those of the context, counted from the first one, then those of the nodes."""
    depths, above = [0], [{0}]
    for node in range(1, len(parents)):
        depths.append(depths[parents[node]] + 1)
        above.append({node, *above[parents[node]]})
    result = []
    for node, depth in enumerate(depths):
        place = length + depth
        context = [num_padded <= slot < length and place - slot < window for slot in range(num_slots)]
        nodes = [other in above[node] and depth - depths[other] < window for other in range(len(parents))]
        result.append(context + nodes)
    return result


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [[7], [7, 7], [5, 7]], ids=str)
@pytest.mark.parametrize("num_padded", [0, 2])
def test_a_window_ends_within_a_tree_too(window, lengths, num_padded):
    """A node does not see its own ancestors `window` levels above it, as token by token it would not."""
    parents = [[0, 0, 1, 2, 0, 3, 5, 4], [0, 0, 0, 0, 3, 4, 5, 6]][: len(lengths)]
    tree, num_slots = parents_of(parents), max(lengths)
    prompt_mask = torch.ones(len(lengths), 4, dtype=torch.bool)
    prompt_mask[0, :num_padded] = False
    context = ContextSlots(lengths, prompt_mask if num_padded else None)
    expected = torch.tensor(
        [
            visible_in_window(parents[row], length, 0 if row else num_padded, num_slots, window)
            for row, length in enumerate(lengths)
        ]
    )
    mask = tree_attention_mask(tree.ancestors, context, torch.float32, Reach(window), tree.depths)
    assert torch.equal(mask[:, 0] == 0, expected)
    mask = buffer_attention_mask(
        tree.ancestors, tree.depths, torch.tensor([num_slots]), context, 20, torch.float32, Reach(window)
    )
    assert torch.equal(mask[:, 0, :, : num_slots + 8] == 0, expected) and not (mask[..., num_slots + 8 :] == 0).any()


@pytest.mark.parametrize("window", [2, 3])
def test_trees_deeper_than_a_window_are_verified_as_token_by_token(window):
    family = FAMILIES["mistral"]
    target = family.build(sliding_window=window)
    assert largest_difference(target, family.inputs(1, num_text=12), seed=1) < 1e-9


# Limits.


@pytest.mark.parametrize("limits", [(12, 20), (20, 12), (15, 15)], ids=str)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_of_two_length_limits_the_shorter_one_counts(is_compiled, limits):
    """In whichever order they are given."""
    pair = tiny.pair(0)
    draft = pair.with_tree(12, 3, 4)
    inputs = tiny.make_prompt(4, 7)
    options = {
        "max_new_tokens": 30,
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(limit) for limit in limits]),
    }
    expected = pair.target.generate(**inputs, **options)
    assert expected.shape[1] == min(limits)
    with compilation(draft, is_compiled):
        assert torch.equal(pair.target.generate(**inputs, **options, assistant_model=draft), expected)


# Ties.


@pytest.mark.parametrize("is_compiled", [False, True])
def test_ties_that_arise_in_float32_are_resolved_as_generate_does(is_compiled):
    """In float64 the other one of two tokens is the better one by so little that float32 cannot tell."""
    pair = tiny.pair(0)
    target, draft = copy.deepcopy(pair.target), copy.deepcopy(pair.with_tree(12, 3, 4))
    first, second = slice(3, 31), slice(31, 59)
    with torch.no_grad():
        weight = target.get_output_embeddings().weight
        weight[second] = weight[first] * (1 + 1e-12)
    for seed in range(3):
        inputs = tiny.make_prompt(seed, 8)
        expected = target.generate(**inputs, max_new_tokens=24)
        logits = target(expected).logits[0, 7:-1]
        assert (logits.argmax(-1) != logits.float().argmax(-1)).sum() > 8
        with compilation(draft, is_compiled):
            assert torch.equal(target.generate(**inputs, max_new_tokens=24, assistant_model=draft), expected)


# Streamers.


class VerifiedTokens(BaseStreamer):
    def __init__(self):
        self.rounds: list[tuple[list[int], int]] = []

    def put(self, value):
        pass  # the prompt

    def put_verified(self, tokens, num_draft_tokens):
        self.rounds.append((tokens.tolist(), num_draft_tokens))

    def end(self):
        pass


# The rounds of the host with argmax, those of the device, and those in which a processor looks at each token.
WAYS = {
    "argmax": (False, {}),
    "device": (True, {}),
    "in sequence": (False, {"no_repeat_ngram_size": 12}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_drafted_token_that_ends_the_text_is_shown_as_drafted(way):
    """Of the last round, whose last token is not the target's own behind the accepted ones."""
    is_compiled, options = WAYS[way]
    pair = tiny.pair(0)
    draft = pair.with_tree(12, 3, 4)
    num_ends = 0
    for seed in range(2):
        inputs = tiny.make_prompt(seed, 8)
        streamers = [VerifiedTokens()]
        with compilation(draft, is_compiled):
            pair.target.generate(**inputs, max_new_tokens=20, assistant_model=draft, streamer=streamers[0], **options)
        _, *rounds, _ = streamers[0].rounds  # the first token, and a round that the limit may have cut
        before = list(streamers[0].rounds[0][0])
        for number, (tokens, num_draft_tokens) in enumerate(rounds, start=1):
            assert num_draft_tokens == len(tokens) - 1
            for place, eos in enumerate(tokens):
                if eos not in before:
                    streamer = VerifiedTokens()
                    with compilation(draft, is_compiled):
                        pair.target.generate(
                            **inputs,
                            max_new_tokens=20,
                            eos_token_id=eos,
                            assistant_model=draft,
                            streamer=streamer,
                            **options,
                        )
                    expected = (tokens[: place + 1], min(place + 1, len(tokens) - 1))
                    assert streamer.rounds == [*streamers[0].rounds[:number], expected]
                    num_ends += place < len(tokens) - 1
                before.append(eos)
    assert num_ends > 2


# Images.


def test_a_branch_of_text_that_repeats_itself_ends_before_an_image():
    """What followed the same words before was an image: its tokens are none that the target could say."""
    pair = tiny.pair(0)
    draft = copy.deepcopy(pair.with_tree(4, 1, 2))
    draft.set_draft_vocab(range(3, tiny.IMAGE_TOKEN_ID))  # so that the draft itself proposes no image token
    draft.generation_config.suffix_nodes = 3
    inputs = tiny.make_prompt(0, 8, images_at=(6,))
    assert inputs["input_ids"][0, 6] == tiny.IMAGE_TOKEN_ID != inputs["input_ids"][0, 5]
    inputs["input_ids"][0, 3:6] = 7  # in front of the image
    inputs["input_ids"][0, -2:] = 7  # and, with the next token, at the end
    options = {"max_new_tokens": 8, "suppress_tokens": [token for token in range(tiny.VOCAB_SIZE) if token != 7]}
    proposed: list[list[int]] = []
    with observing(on_logits=lambda tree, logits: proposed.append(tree.tokens[0, 1:].tolist())):
        output = pair.target.generate(**inputs, **options, assistant_model=draft)
    assert output[0, -8:].tolist() == [7] * 8
    assert not any(tiny.IMAGE_TOKEN_ID in tokens for tokens in proposed)
    assert len(proposed[0]) == 3 and any(len(tokens) > 3 for tokens in proposed)  # no branch at first, then some
