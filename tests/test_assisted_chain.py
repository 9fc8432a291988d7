"""The draft proposes chains in transformers' own assisted loop, as a baseline of `msd-hf bench`."""

import random
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from family_drafts import family_pair
from tiny import IMAGE_TOKEN_ID, NUM_PAIRS, build_draft, build_target, is_fitted, make_prompt, pair, random_prompt
from transformers import AutoModelForImageTextToText, GenerationMixin

from msd_hf import MSDDraftModel, MSDPairingError
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.evaluation.methods import ASSISTED_CHAIN, Method
from msd_hf.evaluation.observation import observe
from msd_hf.evaluation.timed_run import timed_generate
from msd_hf.prompts import build_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts


NUM_TOKENS = 24
ARGUMENTS = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN_ID]}


@contextmanager
def record_forward_widths(target):
    """Records how many tokens each forward of the target reads."""
    widths = []
    handle = target.get_decoder().register_forward_hook(lambda module, args, output: widths.append(output[0].shape[1]))
    try:
        yield widths
    finally:
        handle.remove()


@contextmanager
def record_chains():
    """Records the candidates of each round and the draft's probability of each candidate."""
    chains, original = [], GrowingDrafter.propose

    def propose(*args, **kwargs):
        tree = original(*args, **kwargs)
        scores = [] if tree.scores is None else tree.scores[0].tolist()
        confidences = [below - above for above, below in pairwise(scores)]
        chains.append((tree.tokens[0, 1:].tolist(), torch.tensor(confidences).exp().tolist()))
        return tree

    GrowingDrafter.propose = propose
    try:
        yield chains
    finally:
        GrowingDrafter.propose = original


@pytest.mark.parametrize("number", range(NUM_PAIRS))
def test_gives_the_tokens_of_the_target_alone_in_fewer_forwards(number):
    target, draft = pair(number).target, pair(number).draft
    rng, num_forwards, num_tokens = random.Random(number), 0, 0
    for _ in range(6):
        inputs = random_prompt(rng)
        expected = timed_generate(target, inputs, **ARGUMENTS).tokens
        with record_forward_widths(target) as widths:
            assert timed_generate(target, inputs, draft, ASSISTED_CHAIN, **ARGUMENTS).tokens == expected
        num_forwards += len(widths)
        num_tokens += len(expected)
    assert not is_fitted(number) or num_forwards < 0.8 * num_tokens


def test_gives_the_tokens_of_the_bundled_target(toy_processor):
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR).double()
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR).double()
    arguments = {"max_new_tokens": 60, "do_sample": False}
    for prompt in make_evaluation_prompts(prompts_per_kind=1, seed=3)[::2]:
        inputs = build_inputs(toy_processor, prompt.question, prompt.image).to(dtype=torch.float64)
        expected = timed_generate(target, inputs, **arguments).tokens
        with record_forward_widths(target) as widths:
            assert timed_generate(target, inputs, draft, ASSISTED_CHAIN, **arguments).tokens == expected
        assert len(widths) < 0.6 * len(expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma2", "gemma3"])
def test_other_families(name):
    """These families have three-dimensional positions, sliding windows, scaled embeddings or token types."""
    pair, arguments = family_pair(name), {"max_new_tokens": 16, "do_sample": False}
    for number in range(3):
        inputs = pair.family.inputs(number, 1 if pair.family.has_images else 0, "middle")
        expected = pair.target.generate(**inputs, **arguments)
        with (
            record_forward_widths(pair.target) as widths,
            ASSISTED_CHAIN.prepared(pair.target, pair.draft) as assistant,
        ):
            assert pair.target.generate(**inputs, **arguments, **assistant).tolist() == expected.tolist()
        assert len(widths) < 16


@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_drafts_as_our_own_loop_does(layers):
    """The draft gets the same features from both loops, so its chains are equal and are accepted equally far."""
    target = pair(0).target
    draft = pair(0).draft if layers is None else build_draft(target, target_layers=layers)
    chain = {"tree_depth": 3, "tree_top_k": 1}
    own = Method("own", "", drafted=True, tree={**chain, "num_assistant_tokens": 5})
    settings = {**chain, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}
    assisted = Method("assisted", "", drafted=True, assisted=True, tree=settings)
    for seed, images_at in enumerate([(), (2,), (0, 5)]):
        inputs = make_prompt(seed, 8, images_at, padding=seed)
        proposed, lengths = [], []
        for method in (own, assisted):
            with record_chains() as chains:
                lengths.append(observe(target, inputs, draft, method, **ARGUMENTS).acceptance_lengths)
            proposed.append([tokens for tokens, _ in chains if tokens])
        assert lengths[0] == lengths[1]
        assert proposed[0] == proposed[1]


def test_a_chain_ends_after_an_unsure_token():
    target, draft = pair(0).target, pair(0).draft
    found = set()
    for seed in range(4):
        with record_chains() as chains:
            timed_generate(target, make_prompt(seed), draft, ASSISTED_CHAIN, **{**ARGUMENTS, "max_new_tokens": 60})
        for tokens, confidences in chains[:-1]:
            assert min(confidences[:-1], default=1.0) >= 0.4
            found.add("unsure" if confidences[-1] < 0.4 else len(tokens))
    assert "unsure" in found
    settings = {"num_assistant_tokens": None, "assistant_confidence_threshold": 0.0}
    without = Method("assisted", "", drafted=True, assisted=True, tree=settings)
    with record_chains() as chains:
        timed_generate(target, make_prompt(0), draft, without, **{**ARGUMENTS, "max_new_tokens": 60})
    assert len(chains[0][0]) == 20  # transformers' default


def test_nothing_is_drafted_after_the_end_of_an_answer():
    target, draft = pair(0).target, pair(0).draft
    answer = timed_generate(target, make_prompt(0), **ARGUMENTS).tokens
    ends = 0
    for eos_token_id in answer[2::3]:
        arguments = {**ARGUMENTS, "eos_token_id": eos_token_id}
        expected = timed_generate(target, make_prompt(0), **arguments).tokens
        with record_chains() as chains:
            assert timed_generate(target, make_prompt(0), draft, ASSISTED_CHAIN, **arguments).tokens == expected
        assert all(eos_token_id not in tokens[:-1] for tokens, _ in chains)
        ends += sum(tokens[-1] == eos_token_id for tokens, _ in chains)
    assert ends


def test_generate_is_restored_afterwards():
    target, draft = build_target(), pair(0).draft
    inputs, own_settings = make_prompt(0), draft.generation_config

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in target.modules()]
        return dict(vars(GenerationMixin)), dict(vars(type(target))), list(vars(target)), hooks

    before = state()
    for max_new_tokens in (NUM_TOKENS, -1):  # transformers refuses the second one
        try:
            with ASSISTED_CHAIN.prepared(target, draft) as arguments:
                assert state() != before
                target.generate(**inputs, **{**ARGUMENTS, **arguments, "max_new_tokens": max_new_tokens})
        except ValueError:
            assert max_new_tokens == -1
        else:
            assert max_new_tokens == NUM_TOKENS
        assert state() == before and draft.generation_config is own_settings
    # Our own loop, with trees, serves the draft again.
    output = target.generate(**inputs, **ARGUMENTS, assistant_model=draft, return_dict_in_generate=True)
    assert output.acceptance_lengths


def test_other_assistants_are_left_alone():
    target, draft = pair(0).target, pair(0).with_tree(12, 3, 3)
    inputs = make_prompt(0)
    expected = target.generate(**inputs, **ARGUMENTS).tolist()
    with ASSISTED_CHAIN.prepared(target, draft):
        assert target.generate(**inputs, **ARGUMENTS).tolist() == expected
        for arguments in ({"assistant_model": target}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 999}):
            with record_chains() as chains:
                assert target.generate(**inputs, **ARGUMENTS, **arguments).tolist() == expected
            assert chains == []


def test_refuses_a_draft_of_another_target():
    other = build_draft(build_target(hidden_size=16))
    with pytest.raises(MSDPairingError, match="hidden size 16"), ASSISTED_CHAIN.prepared(pair(0).target, other):
        pass
