"""Targets that read more than the usual inputs, take masks in another way, or verify chains only.

Each is a family of `examples/studies/survey_table.py`, tiny and with random weights. `test_survey.py` runs one call of
each; here are batches, caches that go on, long answers and exceptions.
"""

from __future__ import annotations

import functools
import threading
from itertools import product
from typing import Any

import pytest
import torch
from survey_configs import PAD
from survey_inputs import Inputs, image_inputs, text_inputs
from survey_pairs import build_draft, build_target, has_images
from survey_table import NEEDS_IMAGE
from thinning import thinned
from transformers import DynamicCache, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT_CLASSES

from msd_hf import MSDUnsupportedError
from msd_hf.attention.block_selection import NodePlaces, choose_blocks, indexers_of
from msd_hf.compat import CACHE_NAME
from msd_hf.decoders import decoder_of
from msd_hf.decoding import loop
from msd_hf.decoding.pair import release, state_of
from msd_hf.kv.reference_window import ReferenceWindowLayer, reference_window
from msd_hf.recurrent.replay import MixerCall
from msd_hf.tree.candidate import CandidateTree


TREES = ("idefics", "evolla", "kosmos-2", "kosmos-2.5", "unlimited_ocr", "minimax_m3_vl", "zamba")
CHAINS = ("zaya",)
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 10}
GREEDY = {"do_sample": False}
MODES = {"greedy": GREEDY, "sampling": SAMPLING}

pytestmark = pytest.mark.skipif("zaya" not in TEXT_CLASSES, reason="these families came with later releases")


@functools.cache
def pair_of(model_type: str) -> tuple[Any, Any]:
    target = build_target(model_type)
    if model_type == "kosmos-2":  # its table of positions is made in float32
        target.float()
    return target, build_draft(target)


def inputs_of(model_type: str, seed: int) -> Inputs:
    make = image_inputs if model_type in NEEDS_IMAGE or has_images(model_type) else text_inputs
    return make(pair_of(model_type)[0], seed)


def both(model_type: str, inputs: Inputs, **options: Any) -> tuple[list, list, list[int]]:
    """Tokens of the target alone and with its draft, and how many each verification gave."""
    target, draft = pair_of(model_type)
    set_seed(0)
    expected = target.generate(**inputs, **options)
    set_seed(0)
    output = target.generate(**inputs, **options, assistant_model=draft, return_dict_in_generate=True)
    return expected.tolist(), output.sequences.tolist(), [count for row in output.acceptance_lengths for count in row]


@thinned("model_type,mode", product([*TREES, *CHAINS], MODES), strength=1)
def test_long_answers(model_type, mode):
    """40 tokens leave the window of Unlimited-OCR and several blocks of MiniMax M3."""
    counts = []
    for seed in (1, 2):
        expected, tokens, lengths = both(model_type, inputs_of(model_type, seed), max_new_tokens=40, **MODES[mode])
        assert tokens == expected
        counts += lengths
    assert sum(counts) > 1.1 * len(counts)
    assert state_of(*pair_of(model_type)).is_chain == (model_type in CHAINS)


@pytest.mark.parametrize("model_type", TREES)
def test_rows_that_end_at_different_steps(model_type):
    """What a decoder reads in every forward goes with the rows that are left."""
    rows = [inputs_of(model_type, seed) for seed in (4, 5, 6)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    options = {"max_new_tokens": 20, **GREEDY, "pad_token_id": 0}
    alone = pair_of(model_type)[0].generate(**inputs, **options)
    expected, tokens, _ = both(model_type, inputs, **options, eos_token_id=int(alone[1, -10]))
    assert tokens == expected


def padded(model_type: str) -> Inputs:
    """Two rows, the first of which has padding."""
    target, _ = pair_of(model_type)
    ids = torch.cat([text_inputs(target, seed)["input_ids"] for seed in (1, 2)])
    ids[0, :3] = PAD
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("model_type", ["kosmos-2.5", "minimax_m3_vl", "unlimited_ocr"])
def test_padded_rows(model_type):
    max_new_tokens = 8 if model_type == "unlimited_ocr" else 20  # within its window
    expected, tokens, _ = both(model_type, padded(model_type), max_new_tokens=max_new_tokens, **GREEDY)
    assert tokens == expected


def test_padding_before_a_window_that_moves_is_refused():
    """Without a draft, the text of a padded row is not that of the row alone once its window has moved."""
    target, draft = pair_of("unlimited_ocr")
    options = {"max_new_tokens": 9, **GREEDY, "return_dict_in_generate": True}
    with pytest.raises(MSDUnsupportedError, match=r"window of 8 tokens .* may reach 9"):
        target.generate(**padded("unlimited_ocr"), **options, assistant_model=draft)
    inputs = {name: value[:1] for name, value in padded("unlimited_ocr").items()}
    first = target.generate(**inputs, **{**options, "max_new_tokens": 5})
    given = {"input_ids": first.sequences, CACHE_NAME: first[CACHE_NAME], "assistant_model": draft}
    given["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(1, 5, dtype=torch.long)], dim=1)
    with pytest.raises(MSDUnsupportedError, match="may reach 10"):  # 5 of them stand behind the first prompt
        target.generate(**given, **{**options, "max_new_tokens": 5})


def test_attentions_of_a_window_that_spares_the_prompt():
    target, draft = pair_of("unlimited_ocr")
    options = {"max_new_tokens": 14, **GREEDY, "return_dict_in_generate": True, "output_attentions": True}
    target.set_attn_implementation("eager")
    try:
        expected, got = (
            target.generate(**text_inputs(target, 1), **options, assistant_model=given).attentions
            for given in (None, draft)
        )
    finally:
        target.set_attn_implementation("sdpa")
    assert len(got) == len(expected) == 14
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", ["kosmos-2", "evolla"])
def test_another_thread_finds_the_way_while_a_call_waits(model_type, monkeypatch):
    """The second call begins before the target has been tried, and goes on when the first one has tried it."""
    target, draft = pair_of(model_type)
    release(target if model_type == "evolla" else target.text_model)
    inputs, options = inputs_of(model_type, 1), {"max_new_tokens": 20, **GREEDY}
    expected = target.generate(**inputs, **options)
    check, waits, is_tried, answers = loop.check_tree_verification, threading.Event(), threading.Event(), {}

    def in_turn(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread().name == "second":
            waits.set()
            is_tried.wait()
        check(*args, **kwargs)
        is_tried.set()

    def call() -> None:
        answers[threading.current_thread().name] = target.generate(**inputs, **options, assistant_model=draft)

    monkeypatch.setattr(loop, "check_tree_verification", in_turn)
    second = threading.Thread(target=call, name="second")
    second.start()
    assert waits.wait(60)
    call()
    second.join()
    assert len(answers) == 2 and all(torch.equal(answer, expected) for answer in answers.values())


def test_further_inputs_are_checked_when_they_come():
    """Without a protein, Evolla takes the mask of a tree."""
    target, draft = pair_of("evolla")
    release(target)
    for inputs in (text_inputs(target, 1), inputs_of("evolla", 1), text_inputs(target, 2)):
        expected, tokens, _ = both("evolla", inputs, max_new_tokens=20, **GREEDY)
        assert tokens == expected
    assert state_of(target, draft).masks_attention


@pytest.mark.parametrize("model_type", ["zaya", "zamba", "minimax_m3_vl", "unlimited_ocr", "kosmos-2.5"])
def test_a_returned_cache_goes_on_with_and_without_the_draft(model_type):
    target, draft = pair_of(model_type)
    ids = text_inputs(target, 3)["input_ids"]
    options = {"max_new_tokens": 15, **GREEDY, "return_dict_in_generate": True}
    answers = []
    for first, second in ((None, None), (draft, None), (None, draft), (draft, draft)):
        output = target.generate(ids, **options, assistant_model=first)
        more = torch.cat([output.sequences, torch.tensor([[9, 7, 11]])], dim=1)
        final = target.generate(more, **options, **{CACHE_NAME: output[CACHE_NAME]}, assistant_model=second)
        answers.append(final.sequences.tolist())
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("fails_at", [2, 3])
@pytest.mark.parametrize("model_type", ["zaya", "minimax_m3_vl"])
def test_an_exception_leaves_a_cache_that_goes_on(model_type, fails_at, monkeypatch):
    """Also when it comes while a mixer runs again."""
    target, draft = pair_of(model_type)
    ids = text_inputs(target, 3)["input_ids"]
    target.generate(ids, max_new_tokens=8, **GREEDY, assistant_model=draft)  # the check has been made
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    calls = 0
    place, name = (MixerCall, "repeat") if model_type == "zaya" else (type(target.lm_head), "forward")
    method = getattr(place, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("in the middle")
        return method(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            for seed in range(9):  # a chain that is accepted as a whole repeats nothing
                set_seed(seed)
                cache = DynamicCache(config=target.config.get_text_config(decoder=True))
                target.generate(ids, max_new_tokens=30, **SAMPLING, assistant_model=draft, **{CACHE_NAME: cache})
    held = cache.get_seq_length()
    assert held < ids.shape[1] + 30
    # Which tokens the cache holds beyond the prompt is known to the seed: the same call without the draft.
    set_seed(seed)
    whole = target.generate(ids, max_new_tokens=30, **SAMPLING)
    options = {"max_new_tokens": 8, **GREEDY}
    expected = target.generate(whole[:, : held + 1], **options)
    assert target.generate(whole[:, : held + 1], **options, **{CACHE_NAME: cache}).tolist() == expected.tolist()


@pytest.mark.parametrize("runs_again", [True, False])
def test_states_come_from_the_mixers_that_run_again(runs_again, monkeypatch):
    """The text of this model follows from its last token, so that logits tell more than tokens. Hot sampling rejects
    whole chains, and states from before the chain are read again."""
    target, draft = pair_of("zaya")
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    set_seed(0)
    alone = target.generate(**inputs_of("zaya", 1), **options)
    if not runs_again:
        monkeypatch.setattr(MixerCall, "repeat", lambda call, count: None)
    set_seed(0)
    output = target.generate(**inputs_of("zaya", 1), **options, assistant_model=draft)
    difference = max(
        float((got - expected).abs().max()) for got, expected in zip(output.logits, alone.logits, strict=True)
    )
    assert (difference < 1e-4) == runs_again


@pytest.mark.parametrize("model_type", CHAINS)
def test_chains_are_for_one_sequence(model_type):
    target, draft = pair_of(model_type)
    ids = torch.cat([text_inputs(target, seed)["input_ids"] for seed in (1, 2)])
    with pytest.raises(MSDUnsupportedError, match="one prompt at a time"):
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, assistant_model=draft)


@pytest.mark.parametrize("is_tried", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("model_type", ["evolla", "idefics", "kosmos-2", "unlimited_ocr", "minimax_m3_vl"])
def test_what_is_not_compiled_is_refused(model_type, is_tried):
    target, _ = pair_of(model_type)
    draft = build_draft(target)
    options = {**inputs_of(model_type, 1), "max_new_tokens": 8, "assistant_model": draft}
    if is_tried:
        target.generate(**options)
    draft.generation_config.compile = True
    with pytest.raises(MSDUnsupportedError, match="compile=True` cannot be used here"):
        target.generate(**options)


def test_kosmos_counts_positions_behind_padding():
    """Also when an answer holds the padding token, whose position is that of padding."""
    target, _ = pair_of("kosmos-2.5")
    padding = target.config.text_config.pad_token_id
    inputs = text_inputs(target, 2)
    bias = {(padding,): 100.0, (padding, padding): -200.0}  # padding is every second token
    expected, tokens, _ = both("kosmos-2.5", inputs, max_new_tokens=12, **GREEDY, sequence_bias=bias)
    assert tokens == expected and padding in tokens[0][inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("lengths", [(6,), (6, 1), (6, 5, 4), (2, 1, 1, 9)])
def test_a_window_that_spares_the_prompt_keeps_its_content(lengths):
    """The layer of transformers and ours, filled in the same way, hold the same where neither has lost a slot."""
    window = 4
    theirs = type(next(iter(DynamicCache(config=pair_of("unlimited_ocr")[0].config.text_config).layers)))(window)
    ours = ReferenceWindowLayer()
    for length in lengths:
        keys, values = torch.randn(2, 1, 2, length, 3)
        theirs.update(keys, values)
        ours.update(keys, values)
    made = reference_window(theirs, max_slots=50)
    assert (made.get_seq_length(), made.prefill_length) == (sum(lengths), lengths[0])
    lost = max(sum(lengths[1:]) - (window - 1), 0)
    seen = [*range(lengths[0]), *range(lengths[0] + lost, sum(lengths))]
    assert torch.equal(made.keys[:, :, seen], ours.keys[:, :, seen])
    assert torch.equal(made.values[:, :, seen], ours.values[:, :, seen])
    assert made.min_length == (sum(lengths) if lost else 0)


@pytest.mark.parametrize("seed", range(6))
def test_nodes_choose_the_blocks_of_their_branch(seed):
    """The indexer of MiniMax M3 over a random tree, and over each branch as a text, token by token."""
    decoder = decoder_of(pair_of("minimax_m3_vl")[0])
    (indexer,) = indexers_of(decoder)
    config, length = decoder.config, 9 + seed
    generator = torch.Generator().manual_seed(seed)
    parents = [0, 0]
    parents += [int(torch.randint(max(0, node - 4), node, (1,), generator=generator)) for node in range(2, 16)]
    tree = CandidateTree.from_parents(torch.zeros(1, 16, dtype=torch.long), torch.tensor([parents]), 16)
    # Large states, so that blocks compete.
    states = 3 * torch.randn(1, length + 16, config.hidden_size, generator=generator, dtype=torch.float64)
    context, nodes = states[:, :length], states[:, length:]

    def run(cache, hidden_states, positions, places=None):
        embeddings = decoder.rotary_emb(hidden_states, positions)
        if places is None:
            return indexer(hidden_states, embeddings, cache, positions)
        return choose_blocks(indexer, places, hidden_states, embeddings, cache, positions)

    def filled():
        cache = DynamicCache(config=config)
        run(cache, context, torch.arange(length).unsqueeze(0))
        return cache

    positions = length + tree.depths
    places = torch.cat([torch.arange(length).unsqueeze(0), positions], dim=1)
    visible = torch.cat([torch.ones(1, 16, length, dtype=torch.bool), tree.ancestors], dim=2)
    with torch.no_grad():
        chosen = run(filled(), nodes, positions, NodePlaces(places, visible, length + 16))
        for node in range(16):
            branch = tree.ancestors[0, node].nonzero().squeeze(1).tolist()
            cache = filled()
            for step in branch:
                expected = run(cache, nodes[:, step : step + 1], positions[:, step : step + 1])
            for head in range(chosen.shape[1]):
                assert set(chosen[0, head, node].tolist()) - {-1} == set(expected[0, head, 0].tolist()) - {-1}
