"""Conversations that pass a returned cache to the next call are the same with a draft as without."""

from __future__ import annotations

import copy
import pickle
import random
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from thinning import thinned
from transformers import DynamicCache

from msd_hf.compat import CACHE_NAME


NUM_TURNS = 10


def with_full_mask(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The prompt with a mask of ones: a random token may equal the padding token, which `generate` would mask."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_question(rng: random.Random) -> torch.Tensor:
    return torch.tensor([[rng.randrange(3, tiny.IMAGE_TOKEN_ID) for _ in range(rng.choice([1, 3, 6]))]])


def hold_conversation(
    pair: tiny.Pair,
    draft: Any,
    seed: int,
    new_tokens_only: bool = False,
    do_sample: bool = False,
    turns: int = NUM_TURNS,
):
    """Holds a conversation; returns its answers, their acceptance lengths, and the last output of `generate`."""
    rng = random.Random(seed)
    inputs, cache, answers, lengths = tiny.make_prompt(seed, 8, (3,)), None, [], []
    eos = None
    torch.manual_seed(seed)
    for _ in range(turns):
        past = {} if cache is None else {CACHE_NAME: cache}
        output = pair.target.generate(
            **inputs,
            **past,
            max_new_tokens=rng.choice([3, 9, 14]),
            do_sample=do_sample,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            assistant_model=draft,
        )
        cache = output[CACHE_NAME]
        start = inputs["input_ids"].shape[1]
        answers.append(output.sequences[0, start:].tolist())
        eos = answers[0][-1]  # so that some answers end early
        lengths.append(getattr(output, "acceptance_lengths", [[0]])[0])
        text = torch.cat(
            [output.sequences[:, -1:] if new_tokens_only else output.sequences, random_question(rng)], dim=1
        )
        inputs = {"input_ids": text}
        if new_tokens_only:
            inputs["attention_mask"] = torch.ones(1, cache.get_seq_length() + text.shape[1], dtype=torch.long)
    return answers, lengths, output


@thinned("number,do_sample,new_tokens_only", product([0, 1, 3, 6], [False, True], [False, True]))
def test_ten_turns_are_those_without_the_draft(number, do_sample, new_tokens_only):
    pair = tiny.pair(number)
    pair.set_attention("sdpa")
    expected, _, _ = hold_conversation(pair, None, number, new_tokens_only, do_sample)
    answers, lengths, _ = hold_conversation(pair, pair.with_tree(24, 5, 4), number, new_tokens_only, do_sample)
    assert answers == expected
    accepted = [length for turn in lengths[1:] for length in turn]
    assert sum(accepted) / len(accepted) > 1.3  # later turns are drafted well too


def test_the_second_prefill_reads_new_tokens_only_and_the_draft_knows_the_rest():
    """After two turns the draft's cache equals, up to rounding, the one after a single long turn."""
    pair = tiny.pair(0)
    draft = pair.with_tree(24, 5, 4)
    seen: list[int] = []
    handle = pair.target.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: seen.append(output[0].shape[1]), with_kwargs=True
    )
    try:
        _, _, first = hold_conversation(pair, draft, 3, turns=1)
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        seen.clear()
        options = {"max_new_tokens": 6, "return_dict_in_generate": True, "assistant_model": draft}
        second = pair.target.generate(**with_full_mask(more), **{CACHE_NAME: first[CACHE_NAME]}, **options)
    finally:
        handle.remove()
    assert seen[0] == 4  # the last token of the answer and the question
    whole = pair.target.generate(
        **with_full_mask(more), pixel_values=tiny.make_prompt(3, 8, (3,))["pixel_values"], **options
    )
    assert torch.equal(second.sequences, whole.sequences)
    assert second.acceptance_lengths == whole.acceptance_lengths
    one, other = (output[CACHE_NAME]._msd_draft_memory for output in (second, whole))
    assert one.rows == other.rows == list(range(second.sequences.shape[1] - 1))
    assert one.tokens == other.tokens == second.sequences[0].tolist()
    for ours, theirs in zip(one.cache.layers, other.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-9, rtol=0)
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "change", ["other end", "cropped", "forked", "pickled", "plain turn", "other draft", "emptied"]
)
def test_changes_between_two_turns(change):
    pair = tiny.pair(0)
    draft = pair.with_tree(24, 5, 4)
    _, _, first = hold_conversation(pair, draft, 5, turns=1)
    pixel_values = tiny.make_prompt(5, 8, (3,))["pixel_values"]
    cache, ids, second_draft, extra = first[CACHE_NAME], first.sequences, draft, {}
    if change == "other end":  # as if a template closed the answer with another token
        ids = torch.cat([ids[:, :-1], torch.tensor([[3]])], dim=1)
    elif change == "cropped":
        cache.crop(-5)
        ids = torch.cat([ids[:, : cache.get_seq_length()], torch.tensor([[3, 4]])], dim=1)
    elif change == "forked":
        fork = copy.deepcopy(cache)
        pair.target.generate(
            **with_full_mask(torch.cat([ids, torch.tensor([[9, 9]])], dim=1)),
            **{CACHE_NAME: cache},
            max_new_tokens=9,
            assistant_model=draft,
        )
        cache = fork
    elif change == "pickled":
        cache = pickle.loads(pickle.dumps(cache))
    elif change == "plain turn":
        plain = pair.target.generate(
            **with_full_mask(torch.cat([ids, torch.tensor([[9, 9]])], dim=1)),
            **{CACHE_NAME: cache},
            max_new_tokens=6,
            return_dict_in_generate=True,
        )
        cache, ids = plain[CACHE_NAME], plain.sequences
    elif change == "other draft":
        second_draft = copy.deepcopy(draft)
    else:
        cache.crop(-cache.get_seq_length())
        extra = {"pixel_values": pixel_values}
    ids = torch.cat([ids, torch.tensor([[7, 8, 9]])], dim=1)
    expected = pair.target.generate(**with_full_mask(ids), pixel_values=pixel_values, max_new_tokens=15)
    output = pair.target.generate(
        **with_full_mask(ids), **extra, **{CACHE_NAME: cache}, max_new_tokens=15, assistant_model=second_draft
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("with_draft_first", [False, True])
def test_a_cache_goes_back_and_forth_between_draft_and_none(with_draft_first):
    pair = tiny.pair(1)
    draft = pair.with_tree(16, 3, 4)
    outputs = []
    for drafts in ([None] * 4, [draft, None] * 2 if with_draft_first else [None, draft] * 2):
        cache, ids = DynamicCache(), tiny.make_prompt(2, 9)["input_ids"]
        for number, assistant in enumerate(drafts):
            ids = pair.target.generate(
                **with_full_mask(ids), **{CACHE_NAME: cache}, max_new_tokens=8 + number, assistant_model=assistant
            )
            ids = torch.cat([ids, torch.tensor([[5, 6]])], dim=1)
        outputs.append(ids)
    assert torch.equal(*outputs)


def test_a_batch_of_conversations():
    pair = tiny.pair(1)
    prompts = tiny.left_padded([tiny.make_prompt(seed, 4 + 3 * seed, (1,) if seed else ()) for seed in range(3)])
    outputs = []
    for draft in (None, pair.with_tree(16, 3, 4)):
        inputs, cache = dict(prompts), None
        for turn in range(3):
            past = {} if cache is None else {CACHE_NAME: cache}
            output = pair.target.generate(
                **inputs,
                **past,
                max_new_tokens=10,
                eos_token_id=[11, 23, 31],
                pad_token_id=0,
                return_dict_in_generate=True,
                assistant_model=draft,
            )
            cache = output[CACHE_NAME]
            ids = torch.cat([output.sequences, torch.tensor([[5 + turn, 6]] * 3)], dim=1)
            mask = torch.cat([inputs["attention_mask"], (ids[:, inputs["input_ids"].shape[1] :] != 0).long()], dim=1)
            inputs = {"input_ids": ids, "attention_mask": mask}
        outputs.append(output.sequences)
    assert torch.equal(*outputs)


def test_a_turn_in_inference_mode_keeps_no_inference_tensors():
    """Drafting runs in inference mode, but tensors that are kept or returned must be usable outside of it."""
    pair = tiny.pair(1)
    draft = pair.with_tree(24, 5, 4)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}

    def two_turns(assistant: Any) -> Any:
        with torch.inference_mode():
            first = pair.target.generate(**tiny.make_prompt(5, 8, (2,)), assistant_model=assistant, **options)
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        past = {CACHE_NAME: first[CACHE_NAME]}
        return pair.target.generate(**with_full_mask(more), **past, assistant_model=assistant, **options)

    output = two_turns(draft)
    assert torch.equal(output.sequences, two_turns(None).sequences)
    kept = [output.sequences, *output.logits]
    for cache in (output[CACHE_NAME], output[CACHE_NAME]._msd_draft_memory.cache):
        kept += [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert not any(states.is_inference() for states in kept)
