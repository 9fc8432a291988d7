"""Targets with layers in chunks, with an indexer or with cross-attention: chats, returned caches, states, errors."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, IMAGE_TOKEN_ID
from family_drafts import family_pair
from thinning import thinned
from transformers import (
    DynamicCache,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    set_seed,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from msd_hf import MSDDraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.compiled import compile as compiled
from msd_hf.decoders import decoder_of
from msd_hf.target.adapter import TargetAdapter


KINDS = [name for name in ("llama4_text", "deepseek_v32", "glm_moe_dsa", "mllama") if name in FAMILIES]
STATES_OF_AN_IMAGE = 2 * (4 + 1)  # tiles, each of four patches and one more
FLAGS = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}


def batch(name: str, images: tuple[int, ...], lengths: tuple[int, ...] = (9, 4, 6)) -> dict[str, Any]:
    family = FAMILIES[name]
    counts = images if family.has_images else (0,) * len(images)
    return family.collate([family.prompt(seed, count, num_text=lengths[seed]) for seed, count in enumerate(counts)])


def assert_same(got: Any, expected: Any) -> None:
    """Tensors in nested tuples are equal up to the rounding of float32, in which routers and softmaxes compute."""
    if isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-4)
    else:
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("images", [(0,), (1,), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_states_and_attentions_are_those_of_the_target_alone(name, images):
    pair = family_pair(name)
    inputs = batch(name, images)
    pair.target.set_attn_implementation("eager")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # eager attention makes NaN of padded rows
    try:
        expected = pair.target.generate(**inputs, **FLAGS, max_new_tokens=8)
        got = pair.target.generate(**inputs, **FLAGS, max_new_tokens=8, assistant_model=pair.draft)
    finally:
        pair.target.set_attn_implementation("sdpa")
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert_same(got.hidden_states, expected.hidden_states)
    assert_same(got.attentions, expected.attentions)


def next_turn(name: str, inputs: dict[str, Any], sequences: torch.Tensor, num_new: int = 4) -> dict[str, Any]:
    """Inputs with the answer and new text behind the prompt, and with no pictures but those in the cache."""
    more = torch.randint(3, 70, (len(sequences), num_new), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([sequences, more], dim=1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    following = {"input_ids": ids, "attention_mask": mask}
    if "cross_attention_mask" in inputs:
        tiles = inputs["cross_attention_mask"]
        last = tiles[:, -1:].expand(-1, ids.shape[1] - tiles.shape[1], -1, -1)
        following["cross_attention_mask"] = torch.cat([tiles, last], dim=1)
    return following


@thinned(
    "name,images,drafts,mode",
    product(KINDS, [(1,), (2, 0, 1)], [(1, 1, 1), (0, 1, 0), (1, 0, 1)], ["greedy", "sampling"]),
)
def test_turns_of_a_chat_share_a_cache(name, images, drafts, mode):
    """Each turn with or without the draft; rows end at different steps. Compared with the same turns without it."""
    pair = family_pair(name)
    options: dict[str, Any] = {"max_new_tokens": 9, "return_dict_in_generate": True}
    if mode == "sampling":
        options |= {"do_sample": True, "temperature": 0.7}
    first = batch(name, images)
    set_seed(0)
    alone = pair.target.generate(**first, **{**options, "return_dict_in_generate": False})
    options["eos_token_id"] = int(alone[0, first["input_ids"].shape[1] + 4])
    seen = []
    for chosen in ((0, 0, 0), drafts):
        cache, inputs, texts = DynamicCache(config=pair.target.config), first, []
        for turn, with_draft in enumerate(chosen):
            set_seed(turn)
            given = {"assistant_model": pair.draft} if with_draft else {}
            output = pair.target.generate(**inputs, **options, **given, **{CACHE_NAME: cache})
            texts.append(output.sequences.tolist())
            inputs = next_turn(name, inputs, output.sequences)
        seen.append(texts)
        lengths = [layer.get_seq_length() for layer in cache.layers]
    assert seen[0] == seen[1]
    if name == "mllama":
        assert lengths[1] == lengths[3] == STATES_OF_AN_IMAGE * max(images)
    assert lengths[0] == lengths[2] == inputs["input_ids"].shape[1] - 5  # the last token was not read, 4 are new


class Failing(LogitsProcessor):
    """Raises an error at the given step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step -= 1
        if self.step < 0:
            raise RuntimeError("stop")
        return scores


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_cache_is_whole_after_an_error(name, step):
    """The same cache serves the same prompt again, with what is in it by then."""
    pair = family_pair(name)
    inputs = batch(name, (1,))
    cache = DynamicCache(config=pair.target.config)
    processors = LogitsProcessorList([Failing(step)])
    given = {"assistant_model": pair.draft, CACHE_NAME: cache}
    with pytest.raises(RuntimeError, match="stop"):
        pair.target.generate(**inputs, **given, max_new_tokens=9, logits_processor=processors)
    if step == 0 and name == "mllama":
        assert {layer.get_seq_length() for layer in cache.layers} == {inputs["input_ids"].shape[1], STATES_OF_AN_IMAGE}
    length = cache.get_seq_length()
    assert length >= inputs["input_ids"].shape[1]
    cache.crop(inputs["input_ids"].shape[1] - 2 - length)
    expected = pair.target.generate(**inputs, max_new_tokens=9)
    again = {name: value for name, value in inputs.items() if "pixel" not in name and "aspect" not in name}
    assert torch.equal(pair.target.generate(**again, max_new_tokens=9, **given), expected)


@pytest.mark.parametrize("rows", [(1,), (1, 2, 3)], ids=["one", "batch"])
def test_images_may_come_without_a_mask(rows):
    """Then every token reads all of them, a single token as well as the nodes of a tree."""
    pair = family_pair("mllama")
    inputs = {name: value for name, value in batch("mllama", rows).items() if name != "cross_attention_mask"}
    expected = pair.target.generate(**inputs, max_new_tokens=16)
    assert torch.equal(pair.target.generate(**inputs, max_new_tokens=16, assistant_model=pair.draft), expected)


def test_a_later_turn_may_name_no_image():
    """Its tokens read the images in the cache."""
    pair = family_pair("mllama")
    options = {"max_new_tokens": 12, "return_dict_in_generate": True}
    texts = []
    for given in ({}, {"assistant_model": pair.draft}):
        first = pair.target.generate(**batch("mllama", (1,)), **options, **given)
        ids = torch.cat([first.sequences, torch.tensor([[12, 15, 11]])], dim=1)
        texts.append(pair.target.generate(ids, **options, **given, **{CACHE_NAME: first[CACHE_NAME]}).sequences)
    assert torch.equal(*texts)


def test_a_prefill_that_fails_leaves_no_images_in_the_cache():
    pair = family_pair("mllama")
    inputs = batch("mllama", (1,))
    expected = pair.target.generate(**inputs, max_new_tokens=9)
    cache = DynamicCache(config=pair.target.config)
    layer = pair.target.model.language_model.layers[3]
    handle = layer.mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.target.generate(**inputs, max_new_tokens=9, assistant_model=pair.draft, **{CACHE_NAME: cache})
    handle.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {0}
    got = pair.target.generate(**inputs, max_new_tokens=9, assistant_model=pair.draft, **{CACHE_NAME: cache})
    assert torch.equal(got, expected)


def with_second_image(first: dict[str, Any], sequences: torch.Tensor) -> dict[str, Any]:
    """The next turn shows another image; only its pixels are given."""
    family = FAMILIES["mllama"]
    prompt = family.prompt(7, 1, place="first", num_text=5)
    new = family.collate([prompt])
    ids = torch.cat([sequences, new["input_ids"]], dim=1)
    mask = torch.zeros(1, ids.shape[1], 2, 2, dtype=torch.long)
    mask[:, : sequences.shape[1], 0] = first["cross_attention_mask"][:, -1:, 0]
    mask[:, sequences.shape[1] :, 1] = new["cross_attention_mask"][:, :, 0]
    pictures = {name: value for name, value in new.items() if "pixel" in name or "aspect" in name}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask, **pictures}


@pytest.mark.parametrize("fails_first", [False, True])
def test_a_later_turn_brings_its_own_image(fails_first):
    """A prefill that fails takes its own image along, and not that of the first turn."""
    pair = family_pair("mllama")
    first = batch("mllama", (1,))
    options = {"max_new_tokens": 9, "return_dict_in_generate": True}
    texts = []
    for given in ({}, {"assistant_model": pair.draft}):
        cache = DynamicCache(config=pair.target.config)
        output = pair.target.generate(**first, **options, **given, **{CACHE_NAME: cache})
        second = with_second_image(first, output.sequences)
        if fails_first and given:
            handle = pair.target.model.language_model.layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pair.target.generate(**second, **options, **given, **{CACHE_NAME: cache})
            handle.remove()
            assert [layer.get_seq_length() for layer in cache.layers][1::2] == [STATES_OF_AN_IMAGE] * 2
        output = pair.target.generate(**second, **options, **given, **{CACHE_NAME: cache})
        assert [layer.get_seq_length() for layer in cache.layers][1::2] == [2 * STATES_OF_AN_IMAGE] * 2
        texts.append(output.sequences.tolist())
    assert texts[0] == texts[1]


def test_a_cache_without_a_config_holds_images_too():
    pair = family_pair("mllama")
    inputs = batch("mllama", (1,))
    expected = pair.target.generate(**inputs, max_new_tokens=9)
    cache = DynamicCache()
    given = {"assistant_model": pair.draft, CACHE_NAME: cache}
    assert torch.equal(pair.target.generate(**inputs, max_new_tokens=9, **given), expected)
    cache.crop(-3)
    assert cache.layers[1].get_seq_length() == STATES_OF_AN_IMAGE


def test_no_position_is_visual_where_images_are_read_by_cross_attention():
    """The placeholder's embedding holds nothing of the image, so that the draft reads it as text."""
    ids = batch("mllama", (2,))["input_ids"]
    assert (ids == IMAGE_TOKEN_ID).any() and not TargetAdapter(family_pair("mllama").target).visual_mask(ids).any()


def test_the_decoder_within_the_causal_model_that_llama_4_names(monkeypatch):
    """Release 5.24 of transformers does not run this model, because an output lacks a field."""
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    config = Llama4Config(
        text_config=FAMILIES["llama4_text"].config(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        image_token_index=IMAGE_TOKEN_ID,
    )
    torch.manual_seed(0)
    target = Llama4ForConditionalGeneration(config).double().eval()
    target.set_experts_implementation("eager")
    torch.nn.init.normal_(target.get_input_embeddings().weight)
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    assert target.get_decoder().get_output_embeddings() is not None
    assert decoder_of(target) is target.language_model.model
    ids = torch.tensor([[*range(30, 34), *[IMAGE_TOKEN_ID] * 4, *range(40, 46)]])
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    draft = tiny.sized(MSDDraftModel.from_target(target))
    for pictures in ({}, {"pixel_values": pixels}):
        inputs = {"input_ids": ids if pictures else ids % 70, "attention_mask": torch.ones_like(ids), **pictures}
        expected = target.generate(**inputs, max_new_tokens=16)
        assert torch.equal(target.generate(**inputs, max_new_tokens=16, assistant_model=draft), expected)


@pytest.mark.parametrize("name", KINDS)
def test_features_for_training_are_read_at_every_position(name):
    pair = family_pair(name)
    inputs = batch(name, (1,))
    adapter = TargetAdapter(pair.target)
    features = adapter.features(**inputs)
    assert features.hidden_states.shape == (*inputs["input_ids"].shape, 32)
    expected = pair.target(**inputs).logits
    assert torch.allclose(adapter.head(features.hidden_states), expected, atol=1e-5)


@pytest.mark.parametrize("counts", [(0,), (0, 0, 0)], ids=str)
def test_chunks_in_buffers_of_fixed_shape(counts, monkeypatch):
    """What is compiled runs here without compilation."""
    monkeypatch.setattr(compiled, "_compile", lambda function, mode: function)
    pair = family_pair("llama4_untuned")
    inputs = batch("llama4_untuned", counts)
    expected = pair.target.generate(**inputs, max_new_tokens=20)
    pair.draft.generation_config.compile = True
    try:
        got = pair.target.generate(**inputs, max_new_tokens=20, assistant_model=pair.draft)
    finally:
        pair.draft.generation_config.compile = None
    assert torch.equal(got, expected)
