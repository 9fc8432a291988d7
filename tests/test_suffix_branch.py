"""Suffix branches, which propose what followed an earlier occurrence of the text: index, trees, unchanged output."""

from __future__ import annotations

import copy
import random

import pytest
import tiny
import torch
from test_tree import random_growth
from transformers import DynamicCache

from msd_hf import MSDDraftModel, MSDError
from msd_hf.compat import CACHE_NAME
from msd_hf.tree.candidate import CandidateTree
from msd_hf.tree.settings import TreeSettings
from msd_hf.tree.suffix import SuffixIndex


def with_suffix(draft: MSDDraftModel, suffix_nodes: int, num_nodes: int = 8, **settings) -> MSDDraftModel:
    draft = copy.deepcopy(draft)
    draft.generation_config.update(num_assistant_tokens=num_nodes, tree_depth=2, tree_top_k=3, **settings)
    draft.generation_config.suffix_nodes = suffix_nodes
    return draft


def repeating_prompt(seed: int, images_at: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Ends with the target's own answer twice and its beginning once more, so that the target tends to repeat it."""
    inputs = tiny.make_prompt(seed, 8, images_at)
    answer = tiny.pair(0).target.generate(**inputs, max_new_tokens=12, suppress_tokens=[tiny.IMAGE_TOKEN_ID])
    text = answer[:, inputs["input_ids"].shape[1] :]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], text, text, text[:, :6]], dim=1)
    return inputs


def test_index_continues_after_the_latest_occurrence():
    index = SuffixIndex([1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 1, 2])
    assert index.continuation(4) == []
    index.extend([3])
    assert index.continuation(4) == [6, 7, 1, 2]
    assert SuffixIndex([1, 2, 3, 4, 1, 2, 3], ngram=4).continuation(4) == []


def test_index_follows_a_match_while_it_continues():
    """A match that continues is the longer one. After a token that differs, the latest occurrence counts again."""
    long = [10, 11, 12, 13, 14, 15, 16]
    index = SuffixIndex([*long, 12, 13, 14, 20, 21, *long[:5]])
    assert index.continuation(2) == [15, 16]
    index.extend([20])
    assert index.continuation(1) == [21]


def test_index_repeats_a_match_that_reaches_the_end():
    assert SuffixIndex([4, 1, 2, 3, 1, 2, 3]).continuation(7) == [1, 2, 3, 1, 2, 3, 1]
    assert SuffixIndex([5, 5, 5, 5]).continuation(3) == [5, 5, 5]


def test_visual_tokens_are_not_proposed():
    index = SuffixIndex([1, 2, 3, 4, -1, -1, 5, 1, 2, 3])
    assert index.continuation(4) == [4]
    index.extend([4])
    assert index.continuation(4) == []


def test_index_finds_what_a_full_search_finds():
    """The continuation follows the match that has held so far, else the latest occurrence of the last three tokens."""
    rng = random.Random(0)
    tokens = [rng.randrange(4) for _ in range(300)]
    index = SuffixIndex()
    found, match = 0, None
    for end, token in enumerate(tokens, start=1):
        index.extend([token])
        places = [place for place in range(3, end) if tokens[place - 3 : place] == tokens[max(end - 3, 0) : end]]
        match = match + 1 if match is not None and tokens[match] == token else max(places, default=None)
        assert index.continuation(1) == ([] if match is None else [tokens[match]]), end
        assert bool(places) == (match is not None)
        found += bool(places)
    assert 150 < found < 290


def nodes_along(tree: CandidateTree, row: int, chain: list[int]) -> list[int]:
    """Walks down the tree along a chain of tokens; returns the nodes that carry them."""
    nodes, node = [], 0
    children = {
        (parent, token): number
        for number, (parent, token) in enumerate(
            zip(tree.parents[row].tolist(), tree.tokens[row].tolist(), strict=True)
        )
        if number
    }
    for token in chain:
        if (node, token) not in children:
            break
        node = children[node, token]
        nodes.append(node)
    return nodes


@pytest.mark.parametrize("settings", [(1, 5, 3), (2, 0, 3), (24, 4, 4), (8, 7, 1)])
def test_trees_with_a_branch_are_well_formed(settings):
    torch.manual_seed(0)
    generator, held = random.Random(1), set()
    for trial in range(40):
        tree = random_growth(TreeSettings(*settings), batch_size=3, vocab_size=6, sharpness=2.0).finish()
        num_held, num_new = tree.tokens.shape[1], 1 + trial % 4
        chains = []
        for row in range(3):  # a path of the tree, extended by random tokens
            node = generator.randrange(num_held)
            path = sorted(tree.ancestors[row, node].nonzero()[1:, 0].tolist())
            chain = [int(tree.tokens[row, place]) for place in path]
            chains.append(chain + [generator.randrange(6) for _ in range(tree.max_depth + num_new - len(chain))])
        grown = tree.with_branch(torch.tensor(chains), num_new)
        assert grown.tokens.shape == (3, num_held + num_new) and grown.scores is tree.scores
        expected = CandidateTree.from_parents(grown.tokens, grown.parents, grown.max_depth)
        assert torch.equal(grown.depths, expected.depths) and torch.equal(grown.ancestors, expected.ancestors)
        assert int(grown.depths.max()) <= grown.max_depth == tree.max_depth + num_new
        for part in ("tokens", "parents", "depths"):
            assert torch.equal(getattr(grown, part)[:, :num_held], getattr(tree, part))
        for row in range(3):
            below = list(zip(grown.parents[row].tolist(), grown.tokens[row].tolist(), strict=True))[1:]
            assert len(set(below)) == len(below)  # siblings differ
            assert all(parent <= number for number, (parent, _) in enumerate(below))
            before = nodes_along(tree, row, chains[row])
            after = nodes_along(grown, row, chains[row])
            assert after == [*before, *range(num_held, num_held + num_new)]
            held.add(len(before))
    assert len(held) > (1 if settings[0] > 1 else 0)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("number, num_nodes", [(0, 8), (1, 8), (1, "auto")])
def test_output_is_that_of_the_target_alone(number, num_nodes, do_sample):
    pair = tiny.pair(number)
    pair.set_attention("sdpa")
    draft = with_suffix(pair.draft, 5, num_nodes)
    for seed in range(3):
        inputs = repeating_prompt(seed, (2,) if seed % 2 else ())
        options = {"max_new_tokens": 24, "do_sample": do_sample, "temperature": 0.4 if do_sample else None}
        outputs = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            outputs.append(pair.target.generate(**inputs, **options, assistant_model=assistant))
        assert torch.equal(*outputs), seed


def test_output_of_a_batch_is_that_of_the_target_alone():
    """Some rows repeat earlier text and others do not; some end early."""
    pair = tiny.pair(0)
    draft = with_suffix(pair.draft, 5)
    inputs = tiny.left_padded([repeating_prompt(1), tiny.make_prompt(2, 9, (1,)), repeating_prompt(3, (2,))])
    for options in ({"eos_token_id": [11, 23]}, {"eos_token_id": [11, 23], "no_repeat_ngram_size": 9}, {}):
        arguments = {**inputs, **options, "max_new_tokens": 20, "pad_token_id": 0}
        assert torch.equal(
            pair.target.generate(**arguments, assistant_model=draft), pair.target.generate(**arguments)
        ), options


def acceptance_lengths_of(
    pair: tiny.Pair, draft: MSDDraftModel, inputs: dict[str, torch.Tensor], **options
) -> list[int]:
    output = pair.target.generate(
        **inputs, assistant_model=draft, return_dict_in_generate=True, **{"max_new_tokens": 40, **options}
    )
    return output.acceptance_lengths[0]


def test_a_loop_takes_fewer_rounds():
    """The target can emit only one token, so each node of the branch adds a level below the tree."""
    pair = tiny.pair(0)
    target = copy.deepcopy(pair.target)
    looping = tiny.Pair(target, pair.draft, fitted=True)
    options = {"suppress_tokens": [token for token in range(tiny.VOCAB_SIZE) if token != 7]}
    inputs = tiny.make_prompt(0, 8)
    without = acceptance_lengths_of(looping, with_suffix(pair.draft, 0), inputs, **options)
    lengths = acceptance_lengths_of(looping, with_suffix(pair.draft, 6), inputs, **options)
    assert sum(lengths) == sum(without) == 39
    assert len(lengths) < len(without) / 2
    assert max(lengths) >= 7


@pytest.mark.parametrize("num_nodes", [1, 8])
def test_the_draft_is_fed_all_accepted_tokens_of_a_branch(num_nodes):
    """
    At the end of a call the draft's cache is as long as the target's. With one node there is no tree, and accepted
    tokens wait until the end of the call to be fed.
    """
    pair = tiny.pair(0)
    draft = with_suffix(pair.draft, 4, num_nodes)
    longest = 0
    for seed in range(6):
        ids = repeating_prompt(seed)["input_ids"]
        cache = DynamicCache(config=pair.target.config.get_text_config())
        for max_new_tokens in (9, 6):
            output = pair.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                assistant_model=draft,
                return_dict_in_generate=True,
                **{CACHE_NAME: cache},
            )
            longest = max(longest, *output.acceptance_lengths[0])
            assert cache._msd_draft_memory.cache.get_seq_length() == cache.get_seq_length()
            ids = torch.cat([output.sequences, output.sequences[:, -14:-12]], dim=1)
    assert longest > 1


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 6, 7, 12])
def test_no_node_lies_beyond_the_length_limit(max_new_tokens, monkeypatch):
    pair = tiny.pair(0)
    deepest = []

    def with_branch(tree, tokens, num_nodes, original=CandidateTree.with_branch):
        grown = original(tree, tokens, num_nodes)
        deepest.append(int(grown.depths.max()))
        return grown

    monkeypatch.setattr(CandidateTree, "with_branch", with_branch)
    options = {"suppress_tokens": [token for token in range(tiny.VOCAB_SIZE) if token != 7]}
    inputs = tiny.make_prompt(0, 8)
    inputs["input_ids"][:, -4:] = 7
    lengths = acceptance_lengths_of(pair, with_suffix(pair.draft, 6), inputs, max_new_tokens=max_new_tokens, **options)
    assert sum(lengths) == max_new_tokens - 1
    assert max(deepest, default=0) <= max(max_new_tokens - 2, 0)
    # A branch needs 6 tokens: the first one, 3 levels of the tree, one level of the branch, and the bonus token.
    assert bool(deepest) == (max_new_tokens > 5)


def test_settings_of_suffix_branches():
    settings = TreeSettings(20, 5, 4, suffix_nodes=8)
    assert settings.limited_to(None) == settings == settings.limited_to(15)
    assert settings.limited_to(12) == TreeSettings(20, 5, 4, suffix_nodes=5)
    assert settings.limited_to(4) == TreeSettings(20, 2, 4, suffix_nodes=0)
    with pytest.raises(MSDError, match=r"suffix_nodes.*at least 0, got -1"):
        TreeSettings(suffix_nodes=-1)
    assert TreeSettings.from_generation_config(tiny.pair(0).draft.generation_config).suffix_nodes == 0
