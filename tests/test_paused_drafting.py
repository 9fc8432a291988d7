"""While drafting pauses, the draft does not read the prompt. It reads it when drafting begins again."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import DynamicCache

import msd_hf
from msd_hf.compat import CACHE_NAME
from msd_hf.tree.policy import TreePolicy
from msd_hf.tree.settings import TreeSettings


BARE = TreeSettings(1, 0, 4)


@pytest.fixture
def pair():
    target, draft = tiny.pair(1).target, tiny.pair(1).with_tree(16, 4, 4)
    yield target, draft
    msd_hf.release(target)


@pytest.fixture
def reads(pair, monkeypatch):
    """The lengths of the texts that the draft's own forward reads."""
    lengths, forward = [], pair[1].forward

    def noting(*args, **kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(pair[1], "forward", noting)
    return lengths


@pytest.fixture
def pause(monkeypatch):
    """Pauses drafting for a number of rounds. Whether the draft puts the prompt off is up to `puts_off`."""
    begin_round = TreePolicy.begin_round

    def apply(num_rounds, puts_off=True):
        left = [num_rounds]

        def begin(policy, *state):
            left[0] -= 1
            return BARE if left[0] >= 0 else begin_round(policy, *state)

        monkeypatch.setattr(TreePolicy, "begin_round", begin)
        monkeypatch.setattr(TreePolicy, "is_paused", property(lambda _: puts_off and left[0] > 0))

    return apply


def generate(pair, inputs, draft=True, **options):
    return pair[0].generate(
        **inputs, do_sample=False, pad_token_id=0, assistant_model=pair[1] if draft else None, **options
    )


def test_a_call_in_a_pause_leaves_the_prompt_unread(pair, reads, pause):
    inputs = tiny.make_prompt(0, 12)
    expected = generate(pair, inputs, draft=False, max_new_tokens=12)
    pause(100)
    assert torch.equal(generate(pair, inputs, max_new_tokens=12), expected)
    assert not reads
    pause(0)
    generate(pair, inputs, max_new_tokens=12)
    assert reads


@pytest.mark.parametrize("rows", [1, 3])
def test_drafting_after_a_pause_goes_on_as_with_the_prompt_read_at_once(pair, pause, rows):
    """Rows that end in the pause leave a batch whose prompts are unread."""
    inputs = tiny.left_padded([tiny.make_prompt(row, 6 + 2 * row) for row in range(rows)])
    options = {"max_new_tokens": 24, "return_dict_in_generate": True}
    eos = int(generate(pair, inputs, draft=False, **options).sequences[0, inputs["input_ids"].shape[1] + 2])
    options["eos_token_id"] = eos
    expected = generate(pair, inputs, draft=False, **options).sequences if rows > 1 else None
    if rows == 1:
        del options["eos_token_id"]
        expected = generate(pair, inputs, draft=False, **options).sequences
    lengths = []
    for puts_off in (False, True):
        pause(4, puts_off)
        output = generate(pair, inputs, **options)
        assert torch.equal(output.sequences, expected)
        lengths.append(output.acceptance_lengths)
    assert lengths[0] == lengths[1] and max(max(row) for row in lengths[1]) > 1


def test_the_next_turn_of_a_chat_drafts_as_if_the_pause_had_not_been(pair, pause):
    inputs, lengths = tiny.make_prompt(0, 12), []
    for puts_off in (False, True):
        pause(8, puts_off)
        cache = DynamicCache(config=pair[0].config.get_text_config())
        first = generate(pair, inputs, max_new_tokens=9, return_dict_in_generate=True, **{CACHE_NAME: cache})
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        question = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pause(0)
        options = {"max_new_tokens": 16, "return_dict_in_generate": True, CACHE_NAME: cache}
        lengths.append(generate(pair, question, **options).acceptance_lengths)
    assert lengths[0] == lengths[1] and max(lengths[1][0]) > 1
