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


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_further_layers_start_without_an_effect_and_learn(mlp_bias):
    target = build_target(num_layers=2, dtype=torch.float32, mlp_bias=mlp_bias)
    for parameter in (part for name, part in target.named_parameters() if name.endswith("proj.bias")):
        torch.nn.init.normal_(parameter)
    draft = MSDDraftModel.from_target(target, True, mlp_bias=mlp_bias, num_hidden_layers=3)
    one = MSDDraftModel.from_target(target, True, mlp_bias=mlp_bias)
    one.fc.load_state_dict(draft.fc.state_dict())
    for name, weight in target.model.language_model.layers[-1].state_dict().items():
        assert torch.equal(draft.layers[0].state_dict()[name], weight)
    states = torch.randn(2, 1, 5, 32)
    got = draft(*states).last_hidden_state
    torch.testing.assert_close(got, one(*states).last_hidden_state)
    got.square().sum().backward()
    assert draft.layers[2].self_attn.o_proj.weight.grad.any() and draft.layers[1].mlp.down_proj.weight.grad.any()


def test_a_draft_has_at_least_one_layer(make):
    with pytest.raises(MSDError, match="`draft_layers` must be at least 1, got 0"):
        make(build_target(), draft_layers=0)


def test_it_decodes_what_the_target_does_before_and_after_saving(make, tmp_path):
    target = build_target(num_layers=3)
    draft, num_parameters = make(target, draft_layers=2, init_from_last_layer=True)
    assert draft.num_parameters() == num_parameters + 32  # the first layer's norm, which a random start lacks
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
