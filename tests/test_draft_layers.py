"""Drafts with several layers: what they start from, and that they decode, save and load as others do."""

from __future__ import annotations

import pytest
import torch
from tiny import build_target, make_prompt, sized

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDError
from msd_hf.training import MSDTrainingArguments, new_draft
from msd_hf.training.checkpoint_space import count_parameters


@pytest.fixture
def make(tmp_path):
    def make_draft(target, **arguments):
        args = MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)
        return new_draft(target, args), count_parameters(target.config, args)

    return make_draft


def test_each_layer_starts_as_its_own_layer_of_the_target(make):
    target = build_target(num_layers=3, dtype=torch.float32)
    draft, num_parameters = make(target, draft_layers=2, init_from_last_layer=True)
    layers = target.model.language_model.layers
    for ours, theirs in zip(draft.layers, layers[1:], strict=True):
        assert all(torch.equal(ours.state_dict()[name], weight) for name, weight in theirs.state_dict().items())
    assert not torch.equal(draft.layers[0].mlp.up_proj.weight, draft.layers[1].mlp.up_proj.weight)
    assert draft.num_parameters() == num_parameters + 32  # the first layer's norm, which a random start lacks


def test_a_target_with_too_few_layers_is_refused(make):
    target = build_target(num_layers=2)
    with pytest.raises(MSDError, match="has 2 decoder layers, and the draft 3"):
        make(target, draft_layers=3, init_from_last_layer=True)
    draft, _ = make(target, draft_layers=3, recipe="recommended")  # the recipe's wish gives way
    assert len(draft.layers) == 3
    with pytest.raises(MSDError, match="`draft_layers` must be at least 1, got 0"):
        make(target, draft_layers=0)


def test_it_decodes_what_the_target_does_before_and_after_saving(make, tmp_path):
    target = build_target(num_layers=3)
    draft, _ = make(target, draft_layers=2, init_from_last_layer=True)
    draft = sized(draft.double())
    draft.save_pretrained(tmp_path)
    for loaded in (draft, MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float64)):
        for images_at in ((), (2,)):
            inputs = make_prompt(3, images_at=images_at)
            expected = target.generate(**inputs, max_new_tokens=12, do_sample=False)
            got = target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=loaded)
            assert torch.equal(got, expected)
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in draft.state_dict().items())
