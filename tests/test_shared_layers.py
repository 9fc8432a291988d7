"""Targets whose last layers read the keys of earlier ones: cache layers that hold nothing are passed over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES
from family_drafts import family_pair
from transformers import DynamicCache, LogitsProcessorList, set_seed
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from msd_hf import MSDDraftModel
from msd_hf.compat import CACHE_NAME, holds_nothing
from msd_hf.compiled import compile as compiled
from msd_hf.decoding import device_rounds
from msd_hf.kv.in_place import own_layers
from msd_hf.kv.slots import ContextSlots
from msd_hf.kv.transaction import CacheTransaction, can_commit, make_in_place
from msd_hf.target.adapter import TargetAdapter


NAMES = ("gemma4_e_text", "gemma4_e", "gemma3n_text", "gemma3n")
NUM_TOKENS = 16
TRACED = pytest.param("traced", marks=pytest.mark.slow)
TURNS = [
    ("alone", "draft", "alone"),
    ("draft", "alone", "draft"),
    ("draft", "compiled", "draft"),
    pytest.param(("draft", "traced", "draft"), marks=pytest.mark.slow),
]


def prompts(name: str, count: int = 1, num_text: int = 7) -> dict[str, Any]:
    family = FAMILIES[name]
    return family.collate([family.prompt(seed, family.has_images, num_text=num_text + seed) for seed in range(count)])


def compiled_draft(name: str, monkeypatch: pytest.MonkeyPatch, traced: bool = False) -> MSDDraftModel:
    """The draft of a family with `compile=True`. Its functions run as they are, or under Dynamo without a compiler."""
    if traced:
        monkeypatch.setattr(compiled, "BACKEND", "eager")
    else:
        monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    draft = copy.copy(family_pair(name).draft)
    draft.generation_config = copy.deepcopy(draft.generation_config)
    draft.generation_config.compile = True
    return draft


def both(name: str, draft: MSDDraftModel, inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, Any]:
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, **options}
    target = family_pair(name).target
    set_seed(0)
    expected = target.generate(**inputs, **options)
    set_seed(0)
    return expected, target.generate(**inputs, **options, assistant_model=draft, return_dict_in_generate=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_draft_reads_the_states_of_all_positions(name):
    """A prompt needs the logits of one position only, and Gemma 4 would compute the last layers for that one."""
    target = family_pair(name).target
    adapter, inputs = TargetAdapter(target), prompts(name)
    with adapter.observe() as seen:
        short = target(**inputs, logits_to_keep=1).logits
    with adapter.observe() as expected:
        full = target(**inputs).logits
    assert short.shape[1] == 1
    torch.testing.assert_close(short[:, -1], full[:, -1])
    torch.testing.assert_close(seen.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("kinds", TURNS, ids="-".join)
@pytest.mark.parametrize("name", ["gemma4_e", "gemma3n_text"])
def test_turns_of_a_chat_share_a_cache(name, kinds, monkeypatch):
    target, inputs = family_pair(name).target, prompts(name)
    ids, types = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids", None)
    drafts = {"alone": None, "draft": family_pair(name).draft}
    drafts["compiled"] = drafts["traced"] = compiled_draft(name, monkeypatch, "traced" in kinds)
    cache, options = DynamicCache(config=target.config), {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    del inputs["attention_mask"]
    for number, kind in enumerate(kinds):
        if types is not None:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        expected = target.generate(ids, **inputs, **options)
        # The cache holds the image from the first turn on.
        new = inputs if number == 0 else {key: inputs[key] for key in inputs if key == "mm_token_type_ids"}
        tokens = target.generate(ids, **new, **options, **{CACHE_NAME: cache}, assistant_model=drafts[kind])
        assert tokens.tolist() == expected.tolist()
        assert {layer.get_seq_length() for layer in own_layers(cache)} == {tokens.shape[1] - 1}
        ids = torch.cat([tokens, torch.tensor([[5, 9, 23]])], dim=1)


@pytest.mark.parametrize(
    "name, rows, kind",
    [
        ("gemma4_e", 1, "traced"),
        ("gemma3n", 1, "traced"),
        ("gemma4_e_text", 2, "compiled"),
        pytest.param("gemma4_e_text", 2, "traced", marks=pytest.mark.slow),
    ],
)
def test_compiled_calls(name, rows, kind, monkeypatch):
    draft, served = compiled_draft(name, monkeypatch, kind == "traced"), []
    original = device_rounds.DeviceRounds.run
    monkeypatch.setattr(device_rounds.DeviceRounds, "run", lambda self: (served.append(True), original(self)))
    for options in ({}, {"do_sample": True, "temperature": 0.7}):  # the second call takes the buffers of the first
        expected, output = both(name, draft, prompts(name, rows), **options)
        assert output.sequences.tolist() == expected.tolist()
    assert len(served) == (rows == 1)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, "draft") for name in NAMES),
        ("gemma4_e_text", "compiled"),
        pytest.param("gemma4_e_text", "traced", marks=pytest.mark.slow),
    ],
)
def test_an_empty_cache_of_the_caller(name, kind, with_config, monkeypatch):
    """Without a configuration a cache has no layers behind the last one that holds something."""
    target = family_pair(name).target
    draft = family_pair(name).draft if kind == "draft" else compiled_draft(name, monkeypatch, kind == "traced")
    cache = DynamicCache(config=target.config) if with_config else DynamicCache()
    expected = target.generate(**prompts(name), max_new_tokens=NUM_TOKENS, do_sample=False)
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "assistant_model": draft, CACHE_NAME: cache}
    processors = LogitsProcessorList([lambda ids, scores: scores])  # so that no rounds run on the device alone
    tokens = target.generate(**prompts(name), **options, logits_processor=processors)
    assert tokens.tolist() == expected.tolist()
    assert {layer.get_seq_length() for layer in own_layers(cache)} == {tokens.shape[1] - 1}


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_have_ended_return_to_the_cache(name):
    """The rows end at different steps, leave the batch, and are in the returned cache again."""
    target, draft, inputs = family_pair(name).target, family_pair(name).draft, prompts(name, 3)
    alone = target.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    ends = [int(alone[0, length + 3]), int(alone[1, length + 8])]
    expected, output = both(name, draft, inputs, eos_token_id=ends)
    assert output.sequences.tolist() == expected.tolist()
    for layer in own_layers(output[CACHE_NAME]):
        assert layer.keys.shape[0] == 3 and layer.keys.isfinite().all()


class _Interrupting(BaseStreamer):
    """Raises an exception after some calls."""

    def __init__(self, calls: int):
        self.calls = calls

    def put(self, value: torch.Tensor) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt

    def end(self) -> None: ...


@pytest.mark.parametrize("kind", ["draft", "compiled", TRACED])
@pytest.mark.parametrize("name", ["gemma4_e_text", "gemma3n_text"])
def test_a_call_that_is_interrupted_leaves_a_whole_cache(name, kind, monkeypatch):
    target, inputs = family_pair(name).target, prompts(name)
    draft = family_pair(name).draft if kind == "draft" else compiled_draft(name, monkeypatch, kind == "traced")
    expected = target.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    cache, ids = DynamicCache(config=target.config), inputs["input_ids"]
    with pytest.raises(KeyboardInterrupt):
        target.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, assistant_model=draft,
                        streamer=_Interrupting(6), **{CACHE_NAME: cache})  # fmt: skip
    (length,) = {layer.get_seq_length() for layer in own_layers(cache)}
    assert length > ids.shape[1]
    options = {"max_length": expected.shape[1], "do_sample": False, "assistant_model": draft, CACHE_NAME: cache}
    assert target.generate(expected[:, : length + 1], **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_e"])
def test_states_are_those_of_the_target_alone(name):
    """Layers of Gemma 3n have several streams, so their states have four dimensions."""
    target, draft, options = family_pair(name).target, family_pair(name).draft, {"output_hidden_states": True}
    for rows in (1, 2):
        inputs = prompts(name, rows)
        options |= {"max_new_tokens": NUM_TOKENS, "do_sample": False, "return_dict_in_generate": True}
        expected = target.generate(**inputs, **options)
        output = target.generate(**inputs, **options, assistant_model=draft)
        assert output.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_that_read_layers(name):
    target = family_pair(name).target
    draft = tiny.sized(MSDDraftModel.from_target(target, target_layers=[0, 3]))
    torch.nn.init.normal_(draft.feature_proj.weight, std=0.1)
    expected, output = both(name, draft, prompts(name))
    assert output.sequences.tolist() == expected.tolist()


def test_a_first_layer_that_holds_nothing():
    """`get_seq_length()`, devices and rows come from the layers that hold something."""
    cache = DynamicCache(config=family_pair("gemma4_e_text").target.config)
    if not any(map(holds_nothing, cache.layers)):
        pytest.skip("This release of transformers has no such cache layers.")
    (empty, *_) = (layer for layer in cache.layers if holds_nothing(layer))
    cache.layers = [empty, DynamicLayer(), empty, DynamicLayer()]
    plain = [DynamicLayer(), DynamicLayer()]
    assert all(can_commit(layer) for layer in cache.layers)
    make_in_place(cache, 64)
    slots = CacheTransaction(cache, ContextSlots([0, 0]))

    def append(count: int) -> None:
        for number, layer in enumerate(plain):
            states = torch.randn(2, 1, count, 4)
            layer.update(states, 2 * states)
            cache.update(states, 2 * states, 2 * number + 1)

    slots.begin()
    append(3)
    slots.commit_prompt(None)
    assert slots.context.lengths == [3, 3]
    slots.begin()
    append(4)
    slots.commit([2, 2], torch.tensor([[0, 2], [1, 3]]))
    slots.begin()
    append(2)
    slots.commit([1, 2], None)
    slots.begin()
    append(1)
    slots.abort()
    slots.keep_rows([1], store_others=True)
    slots.restore_rows()
    for number, layer in enumerate(plain):
        kept = [[0, 1, 2, 3, 5, 7], [0, 1, 2, 4, 6, 7, 8]]
        for row in (0, 1):
            ours = cache.layers[2 * number + 1].keys[row, :, : len(kept[row])]
            assert torch.equal(ours, layer.keys[row][:, kept[row]])
