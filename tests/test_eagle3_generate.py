"""With an EAGLE-3 draft `generate` gives the tokens of the target alone, whatever the draft's conventions."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import tiny
import torch
from families import FAMILIES
from recurrent_families import RECURRENT_FAMILIES
from thinning import thinned
from transformers import LlamaForCausalLM

from msd_hf import Eagle3DraftModel, MSDPairingError, MSDUnsupportedError
from msd_hf.decoders import decoder_of
from msd_hf.draft.interface import VISUAL_POSITIONS
from msd_hf.target.adapter import TargetAdapter


MAX_NEW_TOKENS = 10
ALL_FAMILIES = {**FAMILIES, **RECURRENT_FAMILIES}
# Not those whose layers hand on several streams, or do not all run without an image.
SERVED_FAMILIES = [name for name in ALL_FAMILIES if name not in ("hy_v4", "mllama")]
# Conventions of published drafts, in combinations.
KINDS = {
    "flat": {"draft_vocab_size": 40},
    "speculators": {
        "draft_vocab_size": 40,
        "has_own_embedding": True,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "visual_positions": "placeholder",
    },
    "normed": {"fc_norm": True, "norm_output": True, "visual_positions": "dropped"},
    "qwen3": {"qk_norm": True, "num_hidden_layers": 2, "head_dim": 16, "visual_positions": "pooled"},
    "wide": {
        "hidden_size": 48,
        "has_own_embedding": True,
        "eagle_aux_hidden_state_layer_ids": [0, 7],
        "visual_positions": "pooled",
    },
}
PROMPTS = [
    {"num_text": 8},
    {"num_text": 8, "images_at": (2,)},
    {"num_text": 5, "images_at": (0, 3)},
    {"num_text": 9, "images_at": (4,), "padding": 3},
]


@functools.cache
def target_of(is_text: bool = False):
    target = tiny.build_target(seed=3, num_layers=7, num_kv_heads=2)
    if not is_text:
        return target
    llama = LlamaForCausalLM(target.config.text_config).double().eval()
    llama.model.load_state_dict(target.get_decoder().state_dict())
    llama.lm_head.load_state_dict(target.get_output_embeddings().state_dict())
    llama.generation_config = target.generation_config
    return llama


@functools.cache
def draft_of(kind: str, is_text: bool = False) -> Eagle3DraftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        draft = tiny.sized(Eagle3DraftModel.from_target(target_of(is_text), **KINDS[kind]).eval())
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.3)
        if draft.d2t is not None:
            draft.set_draft_vocab(torch.randperm(tiny.VOCAB_SIZE - 1)[: draft.config.draft_vocab_size])
    return draft


def set_tree(draft, nodes=24, depth=4, top_k=6):
    draft.generation_config.update(num_assistant_tokens=nodes, tree_depth=depth, tree_top_k=top_k)
    return draft


def both(target, draft, inputs, **arguments):
    arguments = {"max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True, **arguments}
    torch.manual_seed(5)
    alone = target.generate(**inputs, **arguments)
    torch.manual_seed(5)
    return alone, target.generate(**inputs, **arguments, assistant_model=draft)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_with_and_without_images(kind):
    draft, accepted = set_tree(draft_of(kind)), 0
    for number, (prompt, do_sample) in enumerate(zip(PROMPTS, (False, True, False, True), strict=True)):
        alone, output = both(target_of(), draft, tiny.make_prompt(number, **prompt), do_sample=do_sample)
        assert output.sequences.tolist() == alone.sequences.tolist()
        accepted += sum(length - 1 for length in output.acceptance_lengths[0])
    assert accepted > 0


TREES = {"chain": {"top_k": 1}, "auto": {"nodes": "auto"}, "small": {"nodes": 3, "depth": 1, "top_k": 2}}


@thinned("kind, tree", product(KINDS, TREES), strength=1)
def test_chains_and_automatic_trees_on_text(kind, tree):
    draft = set_tree(draft_of(kind, is_text=True), **TREES[tree])
    alone, output = both(target_of(is_text=True), draft, tiny.make_prompt(1, 9))
    assert output.sequences.tolist() == alone.sequences.tolist()


@thinned("kind, do_sample", product(KINDS, [False, True]), strength=1)
def test_a_ragged_batch(kind, do_sample):
    inputs = tiny.left_padded([tiny.make_prompt(number, **PROMPTS[number]) for number in (0, 1, 2)])
    alone, output = both(target_of(), set_tree(draft_of(kind)), inputs, do_sample=do_sample)
    assert output.sequences.tolist() == alone.sequences.tolist()


@pytest.mark.parametrize("kind", ["speculators", "normed", "wide"])
def test_turns_that_share_a_cache(kind):
    for alone, drafted in tiny.turns_on_one_cache(target_of(), set_tree(draft_of(kind)), [(2,), (), (3,)]):
        assert alone == drafted


@pytest.mark.parametrize("kind", ["flat", "wide"])
def test_a_prompt_given_as_embeddings(kind):
    target = target_of()
    embeds = target.get_input_embeddings()(tiny.make_prompt(3, 9)["input_ids"])
    alone, output = both(target, set_tree(draft_of(kind)), {"inputs_embeds": embeds})
    assert output.sequences.tolist() == alone.sequences.tolist()


@pytest.mark.parametrize("dtype, attention", [(torch.float32, "eager"), (torch.bfloat16, "sdpa")])
def test_a_draft_of_another_dtype(dtype, attention):
    target = target_of()
    draft = set_tree(Eagle3DraftModel.from_target(target, **KINDS["speculators"]).to(dtype).eval())
    draft.set_attn_implementation(attention)
    alone, output = both(target, draft, tiny.make_prompt(1, **PROMPTS[1]))
    assert output.sequences.tolist() == alone.sequences.tolist()


def slow_unless(*names):
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in SERVED_FAMILIES]


@pytest.mark.parametrize("name", slow_unless("qwen3_5"))
def test_targets_of_every_family(name):
    """With and without images; each family with one of the ways of feeding visual positions."""
    family = ALL_FAMILIES[name]
    target = family.build(0)
    num_layers = len(decoder_of(target).layers)
    fields = {
        "eagle_aux_hidden_state_layer_ids": sorted({0, num_layers // 2, num_layers}),
        "visual_positions": VISUAL_POSITIONS[SERVED_FAMILIES.index(name) % len(VISUAL_POSITIONS)],
    }
    draft = set_tree(Eagle3DraftModel.from_target(target, **fields).eval(), nodes=16, depth=3, top_k=4)
    for num_images in (0, 2) if family.has_images else (0,):
        inputs = family.inputs(num_images, num_images)
        alone, output = both(target, draft, inputs, do_sample=num_images > 0)
        assert output.sequences.tolist() == alone.sequences.tolist()


def test_what_does_not_fit_is_refused_before_the_target_runs():
    shallow = tiny.build_target(seed=1, num_layers=2)
    inputs = tiny.make_prompt(0)
    with pytest.raises(MSDPairingError, match=r"reads the hidden states \[2, 1, -1\] .* that has 2 layers"):
        shallow.generate(**inputs, assistant_model=Eagle3DraftModel.from_target(shallow))
    draft = Eagle3DraftModel.from_target(shallow, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    with pytest.raises(MSDPairingError, match=r"expected 3 different ones from 0 to 2\."):
        shallow.generate(**inputs, assistant_model=draft)
    target = target_of()
    draft = Eagle3DraftModel.from_target(target, draft_vocab_size=40, vocab_size=100)
    draft.set_draft_vocab(range(60, 100))
    with pytest.raises(MSDPairingError, match=r"tokens up to 99, and the target's vocabulary has only 60"):
        target.generate(**inputs, assistant_model=draft)
    with pytest.raises(MSDPairingError, match=r"hidden size 64 does not match the target's 32"):
        fields = {"hidden_size": 32, "has_own_embedding": True, "target_hidden_size": 64}
        other = Eagle3DraftModel.from_target(target, visual_positions="placeholder", **fields)
        target.generate(**inputs, assistant_model=other)
    draft = Eagle3DraftModel.from_target(target)
    set_tree(draft).generation_config.compile = True
    with pytest.raises(MSDUnsupportedError, match="reads layers inside the target's decoder"):
        target.generate(**inputs, assistant_model=draft)


def test_the_layers_are_those_that_transformers_counts():
    """The draft reads `hidden_states[i]` of the target's own outputs, 0 being the input of its first layer."""
    target = target_of()
    draft = Eagle3DraftModel.from_target(target, eagle_aux_hidden_state_layer_ids=[0, 2, 5])
    inputs = tiny.make_prompt(1, **PROMPTS[1])
    read = TargetAdapter(target, draft.reads_of(target.get_decoder())).features(**inputs).hidden_states
    expected = target(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read, torch.cat([expected[number] for number in (0, 2, 5)], dim=-1))
