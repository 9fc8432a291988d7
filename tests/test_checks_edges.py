"""Checks before a call: the trial of an unknown target, rotary embeddings by length, fields of original drafts."""

from __future__ import annotations

import json

import golden_sets
import pytest
import tiny
import torch
from families import FAMILIES
from test_odd_calls import ROPES, small_draft, small_target
from transformers import AutoModelForCausalLM

from msd_hf import MSDDraftModel, MSDUnsupportedError
from msd_hf.decoding.self_check import NUM_SIBLINGS


# The trial of a target whose kind is not known.


def wrong_for(target, lengths, change) -> None:
    """Lets a decoder give something else where it gets so many tokens at once."""

    def hook(module, args, output):
        if output[0].shape[1] in lengths:
            output["last_hidden_state"] = change(output[0])
        return output

    target.get_decoder().register_forward_hook(hook)


TREES = (NUM_SIBLINGS + 1, NUM_SIBLINGS + 3)  # the nodes of a trial's tree: with one level, and with two
IDS = torch.arange(3, 12).unsqueeze(0)  # another number of tokens than a tree of a trial has nodes
TWICE = IDS.expand(2, -1)  # a batch gets no chains in place of trees


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_gives_no_numbers_for_a_tree_is_refused(value):
    """The difference is no number either then, and not larger than anything."""
    target = small_target("gpt_neox")
    wrong_for(target, TREES, lambda states: torch.full_like(states, value))
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        target.generate(TWICE, max_new_tokens=8, assistant_model=small_draft())


def test_a_trial_that_could_not_go_deep_is_made_again():
    """Before the end of a text the tree of the trial has one level: what it shows says nothing of a second one."""
    target, draft = small_target("gpt_neox"), small_draft()
    draft.generation_config.num_assistant_tokens = 3
    wrong_for(target, TREES[1:], torch.zeros_like)  # the tree of a whole trial
    expected = target.generate(TWICE, max_new_tokens=3)
    assert torch.equal(target.generate(TWICE, max_new_tokens=3, assistant_model=draft), expected)
    with pytest.raises(MSDUnsupportedError, match="does not verify a candidate tree"):
        target.generate(TWICE, max_new_tokens=8, assistant_model=draft)


def test_a_whole_trial_is_made_once():
    target, draft = small_target("gpt_neox"), small_draft()
    draft.generation_config.num_assistant_tokens = 3
    lengths = []
    target.get_decoder().register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    for max_new_tokens, num_trials in ((3, 0), (8, 2), (8, 2)):  # in two contexts
        target.generate(IDS, max_new_tokens=max_new_tokens, assistant_model=draft)
        assert lengths.count(TREES[1]) == num_trials


# Rotary embeddings.


@pytest.mark.parametrize("num_padded", [0, 10])
def test_longrope_counts_tokens_and_not_padding(num_padded):
    """A prompt that is long from the beginning may be drafted for; one that padding makes long becomes longer yet."""
    config = FAMILIES["llama"].config()
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **ROPES["longrope"]}
    config.max_position_embeddings = 96
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).double().eval()
    draft = tiny.sized(MSDDraftModel.from_target(target).eval())
    inputs = FAMILIES["llama"].inputs(0, num_text=30)
    inputs["input_ids"][:, :num_padded] = 0
    inputs["attention_mask"][:, :num_padded] = 0
    if num_padded:
        with pytest.raises(MSDUnsupportedError, match="longer than 24 tokens"):
            target.generate(**inputs, max_new_tokens=12, assistant_model=draft)
    else:
        expected = target.generate(**inputs, max_new_tokens=12)
        assert torch.equal(target.generate(**inputs, max_new_tokens=12, assistant_model=draft), expected)


# Original drafts.


def load_original(folder, **changes) -> MSDDraftModel:
    """A golden draft with fields of its configuration changed, or, where they are `None`, left out."""
    path = golden_sets.write_original_checkpoint("draft_weights_llava", folder, "llava")
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return MSDDraftModel.from_pretrained(path)


@pytest.mark.parametrize("names", [("type",), ("rope_type",), ("type", "rope_type")], ids="+".join)
def test_rope_scaling_by_its_old_and_new_name(names, tmp_path):
    draft = load_original(tmp_path, rope_scaling={**dict.fromkeys(names, "linear"), "factor": 2.0}, rope_theta=5e5)
    assert draft.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    plain = load_original(tmp_path, rope_scaling=None, rope_theta=5e5)
    torch.testing.assert_close(2 * draft.rotary_emb.inv_freq, plain.rotary_emb.inv_freq)


@pytest.mark.parametrize("names", [("type",), ("rope_type",)], ids="+".join)
def test_multimodal_positions_of_the_original_are_plain_ones(names, tmp_path):
    scaling = {**dict.fromkeys(names, "mrope"), "mrope_section": [2, 3, 3]}
    draft = load_original(tmp_path, rope_scaling=scaling)
    assert draft.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("given, expected", [(None, 1e-6), (1e-5, 1e-5), (3e-4, 3e-4)])
def test_the_epsilon_of_norms_that_the_original_leaves_out(given, expected, tmp_path):
    """The original's configuration class has another default than this package's."""
    draft = load_original(tmp_path, rms_norm_eps=given)
    assert draft.config.rms_norm_eps == expected
    assert draft.layers[0].post_attention_layernorm.variance_epsilon == expected
