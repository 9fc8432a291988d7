"""A draft that reads a part of the visual rows: outputs stay those of the target, and which rows it holds is known."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import tiny
import torch

from msd_hf import MSDError
from msd_hf.cli.options import set_visual_rows
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import pair as pair_states
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.drafting.visual_rows import evenly_spaced, keep_visual_rows, most_visual_rows
from msd_hf.target.adapter import TargetAdapter


BUDGETS = (0, 1, 5, None)


def generate(
    pair: Any, budget: Any, inputs: dict[str, Any], tokens: int = 24, is_compiled: bool = False, **options: Any
) -> Any:
    draft = pair.with_tree(24, 4, 4)
    draft.generation_config.max_visual_rows, draft.generation_config.compile = budget, is_compiled
    options = {"max_new_tokens": tokens, "return_dict_in_generate": True, **options}
    return pair.target.generate(**inputs, **options, assistant_model=draft)


def memory_of(output: Any) -> Any:
    return output[CACHE_NAME]._msd_draft_memory


@pytest.mark.parametrize("count, most, expected", [(3, 5, [0, 1, 2]), (9, 3, [1, 4, 7]), (4, 1, [2]), (7, 0, [])])
def test_rows_are_evenly_spaced(count, most, expected):
    assert evenly_spaced(count, most) == expected


def test_the_choice_of_rows_in_a_batch():
    visual = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 1, 1, 1]]).bool()
    kept, _ = keep_visual_rows(visual, real, 2)
    rows = [row[mask].tolist() for row, mask in zip(kept.index, kept.mask, strict=True)]
    assert rows == [[1, 3, 5, 6], [1, 4, 6], [4, 5, 6]]
    assert kept.mask.tolist() == [[True] * 4, [False, True, True, True], [False, True, True, True]]
    assert keep_visual_rows(visual, real, 6) is None


def test_held_rows_of_earlier_turns_make_room():
    """12 visual rows, 6 of them held: every third stays."""
    held = [False, *[True] * 6, False]
    visual = torch.tensor([[1] * 6 + [0]]).bool()
    kept, held_left = keep_visual_rows(visual, None, 4, held)
    assert held_left == [0, 2, 5, 7] and kept.index.tolist() == [[1, 4, 6]]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("number", range(3))
def test_a_prompt_with_images(number, budget):
    pair = tiny.pair(number)
    inputs = tiny.make_prompt(number, 8, (0, 3, 3, 8))
    expected = pair.target.generate(**inputs, max_new_tokens=24)
    output = generate(pair, budget, inputs)
    assert torch.equal(output.sequences, expected)
    memory = memory_of(output)
    visual = (output.sequences[0, 1:] == tiny.IMAGE_TOKEN_ID).tolist()  # row j holds the token at position j + 1
    count = sum(visual)
    assert sum(memory.visual) == (count if budget is None else min(budget, count))
    assert memory.visual == [visual[row] for row in memory.rows]
    assert [row for row in memory.rows if not visual[row]] == [row for row in range(len(visual)) if not visual[row]]
    assert all(layer.get_seq_length() == len(memory.rows) for layer in memory.cache.layers)


def test_kept_rows_stand_at_their_true_positions():
    pair = tiny.pair(0)
    draft = pair.with_tree(24, 4, 4)
    inputs = tiny.make_prompt(0, 8, (0, 3, 3, 8))
    adapter = TargetAdapter(pair.target)
    features = adapter.features(**inputs)
    output = generate(pair, 5, inputs, tokens=1, do_sample=False)
    memory = memory_of(output)
    rows = torch.tensor(memory.rows)
    assert len(rows) == inputs["input_ids"].shape[1] - (15 - 5)  # position 0 has no row, and an image begins there
    embeds = torch.cat([features.inputs_embeds, adapter.embed(output.sequences[:, -1:])], dim=1)[:, 1:]
    visual = torch.cat([features.visual_mask, torch.zeros(1, 1, dtype=torch.bool)], dim=1)[:, 1:]
    cache = GrowingDrafter(draft, adapter).cache
    with torch.no_grad():
        draft(
            inputs_embeds=embeds[:, rows],
            hidden_states=features.hidden_states[:, rows],
            visual_mask=visual[:, rows],
            position_ids=rows.unsqueeze(0),
            past_key_values=cache,
        )
    for ours, theirs in zip(memory.cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-9, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "mode", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "sampling"]
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_batches_keep_different_numbers(budget, mode):
    """Rows with two images, one, and none, of different lengths. Each accepts what it accepts alone."""
    pair = tiny.pair(1)
    prompts = [tiny.make_prompt(1, 8, (2, 5)), tiny.make_prompt(2, 5, (0,)), tiny.make_prompt(3, 6)]
    inputs = tiny.left_padded(prompts)
    torch.manual_seed(0)
    expected = pair.target.generate(**inputs, max_new_tokens=24, **mode)
    torch.manual_seed(0)
    output = generate(pair, budget, inputs, **mode)
    assert torch.equal(output.sequences, expected)
    if not mode["do_sample"]:
        alone = [generate(pair, budget, prompt).acceptance_lengths[0] for prompt in prompts]
        assert output.acceptance_lengths == alone


@pytest.mark.parametrize("budget", [0, 3, 6])
def test_chats_with_new_images(budget):
    pair = tiny.pair(2)
    caches: dict[bool, Any] = {True: None, False: None}
    ids = torch.empty(1, 0, dtype=torch.long)
    for turn in range(4):
        prompt = tiny.make_prompt(turn, 6, (1, 4) if turn != 2 else ())
        ids = torch.cat([ids, prompt["input_ids"]], dim=1)
        inputs = {name: value for name, value in prompt.items() if name == "pixel_values"}
        texts = {}
        for drafts in (False, True):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
            options = {CACHE_NAME: caches[drafts]} if caches[drafts] is not None else {}
            if drafts:
                texts[drafts] = generate(pair, budget, given, tokens=8, **options)
            else:
                texts[drafts] = pair.target.generate(
                    **given, **options, max_new_tokens=8, return_dict_in_generate=True
                )
            caches[drafts] = texts[drafts][CACHE_NAME]
        assert torch.equal(texts[True].sequences, texts[False].sequences)
        memory = memory_of(texts[True])
        visual = (texts[True].sequences[0, 1:] == tiny.IMAGE_TOKEN_ID).tolist()
        assert memory.visual == [visual[row] for row in memory.rows]
        assert sum(memory.visual) == min(budget, sum(visual))
        assert all(layer.get_seq_length() == len(memory.rows) for layer in memory.cache.layers)
        ids = texts[True].sequences


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"do_sample": True}], ids=["device", "host"])
@pytest.mark.parametrize("budget", [0, 3])
def test_rounds_of_fixed_shapes(budget, mode, monkeypatch):
    """One prompt over two turns, and a batch. What is compiled runs as it is."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    monkeypatch.setattr(pair_states, "_pairs", weakref.WeakKeyDictionary())
    pair = tiny.pair(1)
    prompts = [tiny.make_prompt(1, 8, (2, 5)), tiny.make_prompt(2, 5, (0,)), tiny.make_prompt(3, 6)]
    for inputs in (prompts[0], tiny.left_padded(prompts)):
        torch.manual_seed(0)
        expected = pair.target.generate(**inputs, max_new_tokens=16, **mode)
        torch.manual_seed(0)
        output = generate(pair, budget, inputs, tokens=16, is_compiled=True, **mode)
        assert torch.equal(output.sequences, expected)
    output = generate(pair, budget, prompts[0], tokens=16, is_compiled=True, do_sample=False)
    growing = generate(pair, budget, prompts[0], tokens=16, do_sample=False)
    assert memory_of(output).rows == memory_of(growing).rows
    new = tiny.make_prompt(7, 6, (2,))
    ids = torch.cat([output.sequences, new["input_ids"]], dim=1)
    answers = [
        generate(
            pair, budget, {**new, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, is_compiled=flag, **rest
        )
        for flag, rest in ((True, {CACHE_NAME: output[CACHE_NAME]}), (False, {CACHE_NAME: growing[CACHE_NAME]}))
    ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert memory_of(answers[0]).rows == memory_of(answers[1]).rows


def test_auto_is_what_the_draft_was_trained_with():
    pair = tiny.pair(0)
    settings = pair.with_tree(24, 4, 4).generation_config
    for value, trained, expected in (("auto", 5, 5), ("auto", None, None), (None, 5, None), (7, 5, 7)):
        settings.max_visual_rows = value
        assert most_visual_rows(settings, trained) == expected


@pytest.mark.parametrize("value", [-1, 2.5, "all", True, [3]], ids=str)
def test_other_values_are_refused(value):
    with pytest.raises(MSDError, match="max_visual_rows"):
        generate(tiny.pair(0), value, tiny.make_prompt(0, 8))


@pytest.mark.parametrize("value, kept", [("3", 3), ("all", None), ("auto", "auto")])
def test_the_option_of_commands(value, kept):
    draft = tiny.pair(0).with_tree(24, 4, 4)
    set_visual_rows(draft, value)
    assert draft.generation_config.max_visual_rows == kept
    with pytest.raises(MSDError, match="max_visual_rows"):
        set_visual_rows(draft, "some")
    draft.generation_config.max_visual_rows = None
