"""With a ViSpec draft `generate` gives the tokens of the target alone."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from families import FAMILIES
from transformers import AutoModel

from msd_hf import AutoDraft, MSDDraftModel, MSDUnsupportedError, ViSpecDraftConfig, ViSpecDraftModel
from msd_hf.drafting.visual_rows import keep_visual_rows
from msd_hf.training import MSDTrainer, MSDTrainingArguments


@functools.cache
def target_of():
    return tiny.build_target(seed=3, num_kv_heads=2)


@functools.cache
def draft_of(num_queries: int = 2, num_layers: int = 1) -> ViSpecDraftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        fields = {"num_queries": num_queries, "num_hidden_layers": num_layers}
        draft = tiny.sized(ViSpecDraftModel.from_target(target_of(), **fields).eval())
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return draft


def set_tree(draft, nodes=24, depth=4, top_k=6, **more):
    draft.generation_config.update(num_assistant_tokens=nodes, tree_depth=depth, tree_top_k=top_k, **more)
    return draft


def check(target, draft, inputs, **arguments):
    arguments = {"max_new_tokens": 10, "return_dict_in_generate": True, **arguments}
    torch.manual_seed(5)
    alone = target.generate(**inputs, **arguments)
    torch.manual_seed(5)
    output = target.generate(**inputs, **arguments, assistant_model=draft)
    assert output.sequences.tolist() == alone.sequences.tolist()
    return sum(length - 1 for length in output.acceptance_lengths[0])


PROMPTS = [
    {"num_text": 8},
    {"num_text": 8, "images_at": (2,)},
    {"num_text": 5, "images_at": (0, 3)},
    {"num_text": 9, "images_at": (4, 6, 9), "padding": 3},
]


@pytest.mark.parametrize("num_queries, num_layers", [(2, 1), (4, 2), (8, 1)])
def test_prompts_with_none_one_and_several_images(num_queries, num_layers):
    """Also with more rows for an image than it has patches."""
    draft, accepted = set_tree(draft_of(num_queries, num_layers)), 0
    for number, prompt in enumerate(PROMPTS):
        accepted += check(target_of(), draft, tiny.make_prompt(number, **prompt), do_sample=number % 2 > 0)
    assert accepted > 0


@pytest.mark.parametrize("tree", [{"top_k": 1}, {"nodes": "auto"}, {"max_visual_rows": 1}])
def test_other_trees_and_fewer_rows(tree):
    draft = draft_of(4)
    own = draft.generation_config.to_dict()
    check(target_of(), set_tree(draft, **tree), tiny.make_prompt(2, **PROMPTS[2]))
    draft.generation_config.update(**own)


@pytest.mark.parametrize("attention, dtype", [("eager", torch.float64), ("sdpa", torch.bfloat16)])
def test_another_attention_and_dtype(attention, dtype):
    draft = set_tree(ViSpecDraftModel.from_target(target_of()).to(dtype).eval())
    draft.set_attn_implementation(attention)
    check(target_of(), draft, tiny.make_prompt(2, **PROMPTS[2]))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_ragged_batch(do_sample):
    inputs = tiny.left_padded([tiny.make_prompt(number, **PROMPTS[number]) for number in (0, 1, 2)])
    check(target_of(), set_tree(draft_of()), inputs, do_sample=do_sample)


def drafter_vectors(monkeypatch) -> list:
    """The vectors that the draft's prompts end with."""
    seen: list = []
    forward = ViSpecDraftModel.forward

    def record(self, *args, image_vectors=None, last_row_only=False, **kwargs):
        if last_row_only:
            seen.append(None if image_vectors is None else image_vectors[:, -1])
        return forward(self, *args, image_vectors=image_vectors, last_row_only=last_row_only, **kwargs)

    monkeypatch.setattr(ViSpecDraftModel, "forward", record)
    return seen


def test_turns_that_share_a_cache(monkeypatch):
    """The vector of an image goes on through turns without one."""
    seen = drafter_vectors(monkeypatch)
    for alone, drafted in tiny.turns_on_one_cache(target_of(), set_tree(draft_of()), [(), (2,), (), (3,)]):
        assert alone == drafted
    assert seen[0] is None and bool(seen[1].any())
    assert torch.equal(seen[1], seen[2]) and not torch.allclose(seen[2], seen[3])


def test_each_image_has_its_own_rows_and_vector():
    """Also where the texts between images differ in length, and in a batch."""
    draft = draft_of(3)
    embeds = torch.randn(2, 12, 32, dtype=torch.float64)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 1:4] = mask[0, 6:11] = mask[1, 2:7] = True
    with torch.no_grad():
        result, vectors = draft.compress_images(embeds, mask)
        for row, start, end in ((0, 1, 4), (0, 6, 11), (1, 2, 7)):
            adapted = draft.imadpt(embeds[row, start:end])
            torch.testing.assert_close(result[row, end - 2 : end], adapted[:2])
            torch.testing.assert_close(vectors[row, end], draft._added(adapted[2]))
    assert not vectors[0, 0].any() and torch.equal(vectors[0, 4], vectors[0, 5])
    assert torch.equal(result[~mask], embeds[~mask])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_targets_with_other_positions(name):
    family = FAMILIES[name]
    target = family.build(0)
    draft = set_tree(ViSpecDraftModel.from_target(target).eval(), nodes=16, depth=3, top_k=4)
    for num_images in (0, 2):
        check(target, draft, family.inputs(num_images, num_images), do_sample=num_images > 0)


@pytest.mark.slow
def test_compiled_drafting_computes_the_same():
    draft = set_tree(draft_of())
    own = draft.generation_config.to_dict()
    draft.generation_config.compile = True
    try:
        check(target_of(), draft, tiny.make_prompt(1, **PROMPTS[1]), max_new_tokens=4)
    finally:
        draft.generation_config.update(**own, compile=None)


def test_round_trip(tmp_path):
    draft_of(4).save_pretrained(tmp_path)
    for load in (AutoDraft.from_pretrained, AutoModel.from_pretrained, ViSpecDraftModel.from_pretrained):
        loaded = load(tmp_path, dtype=torch.float64)
        assert type(loaded) is ViSpecDraftModel and loaded.config.num_queries == 4
        own = draft_of(4).state_dict()
        assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())


def test_what_is_no_vispec_draft_is_named(tmp_path):
    draft_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected an MSD draft: `msd_hf\.AutoDraft"):
        MSDDraftModel.from_pretrained(tmp_path)
    for fields, message in (
        ({"num_queries": 1}, "`num_queries` must be a number from 2"),
        ({"decouple_visual_tokens": False}, "`decouple_visual_tokens` must be True"),
    ):
        with pytest.raises(ValueError, match=message):
            ViSpecDraftConfig(hidden_size=32, num_attention_heads=4, **fields)
    with pytest.raises(MSDUnsupportedError, match="does not train ViSpec drafts"):
        MSDTrainer(model=draft_of(), target=target_of())
    with pytest.raises(MSDUnsupportedError, match="does not train ViSpec drafts"):
        MSDTrainer(
            model=draft_of(), target=target_of(), args=MSDTrainingArguments(draft_kind="eagle3", report_to="none")
        )


def test_rows_of_an_image_that_are_left():
    mask = torch.tensor([[False, True, True, True, False, True, False], [False, False, True, True, True, True, True]])
    kept, _ = keep_visual_rows(mask, None, None, policy="compressed", rows_per_image=2)
    assert kept.index[0].tolist() == [0, 2, 3, 4, 5, 6] and kept.index[1, -4:].tolist() == [0, 1, 5, 6]


def test_padding_before_an_image_is_no_patch_of_it(monkeypatch):
    """Row j describes the token at j + 1, so the last row of padding describes the first patch."""
    seen = drafter_vectors(monkeypatch)
    for padding in (0, 3):
        check(target_of(), set_tree(draft_of()), tiny.make_prompt(4, 5, images_at=(0,), padding=padding))
    torch.testing.assert_close(seen[0], seen[1])
