"""Drafts that read several target layers, and drafts that start from the target's last layer."""

import pytest
import torch
from families import FAMILIES
from tiny import build_draft, build_target, make_prompt

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDError, MSDPairingError, MSDUnsupportedError
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import MSDTrainingArguments
from msd_hf.training.new_draft import new_draft


def test_adapter_gives_the_outputs_of_the_layers_and_the_last_state():
    target = build_target(seed=1, num_layers=3)
    inputs = make_prompt(0, images_at=(2,))
    target(**inputs)  # transformers adds hooks of its own in the first forward
    hooks = [dict(module._forward_hooks) for module in target.modules()]
    features = TargetAdapter(target, [2, 0]).features(**inputs)
    assert [dict(module._forward_hooks) for module in target.modules()] == hooks
    outputs = target(**inputs, output_hidden_states=True)
    hidden = outputs.hidden_states  # embedding, then the outputs of layers 0, 1 and, normed, 2
    assert features.hidden_states.shape[-1] == 3 * 32
    torch.testing.assert_close(features.hidden_states[..., :32], hidden[1])
    torch.testing.assert_close(features.hidden_states[..., 64:], hidden[-1])
    norm = target.get_decoder().norm
    torch.testing.assert_close(norm(features.hidden_states[..., 32:64]), hidden[-1])


def test_a_new_draft_reads_the_last_state_alone_until_it_is_trained(tmp_path):
    target = build_target(seed=1, num_layers=3)
    with_layers = build_draft(target, seed=2, target_layers=[0, 1])
    without = build_draft(target, seed=5)
    assert without.feature_proj is None
    without.load_state_dict({k: v for k, v in with_layers.state_dict().items() if "feature_proj" not in k})
    inputs = make_prompt(0, images_at=(2,))
    adapter = TargetAdapter(target, [0, 1])
    wide = adapter.features(**inputs)
    layer_states, last = adapter.reads.split(wide.hidden_states)
    narrow = TargetAdapter(target).features(**inputs)
    given = {"inputs_embeds": wide.inputs_embeds, "hidden_states": last, "visual_mask": wide.visual_mask}
    assert torch.equal(last, narrow.hidden_states)
    given["layer_states"] = layer_states
    expected = without(wide.inputs_embeds, narrow.hidden_states, wide.visual_mask)[0]
    torch.testing.assert_close(with_layers(**given)[0], expected)
    torch.nn.init.normal_(with_layers.feature_proj.weight)
    assert not torch.allclose(with_layers(**given)[0], expected)
    with_layers.save_pretrained(tmp_path)
    loaded = MSDDraftModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**given)[0], with_layers(**given)[0])


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_generate_is_identical(seed, do_sample):
    target = build_target(seed=seed, num_layers=3)
    draft = build_draft(target, seed=seed, target_layers=[0, 1], input_layernorm=True)
    torch.nn.init.normal_(draft.feature_proj.weight, std=0.2)
    inputs = make_prompt(seed, images_at=[(), (2,), (0, 8)][seed % 3], padding=[0, 3][seed % 2])
    arguments = {"max_new_tokens": 24, "do_sample": do_sample}
    torch.manual_seed(seed)
    alone = target.generate(**inputs, **arguments)
    torch.manual_seed(seed)
    assert target.generate(**inputs, **arguments, assistant_model=draft).tolist() == alone.tolist()


def test_a_layer_that_the_target_lacks_is_refused():
    target = build_target(seed=1)
    draft = build_draft(target, target_layers=[0, 2])
    with pytest.raises(MSDPairingError, match=r"`target_layers` \[0, 2\] must lie between 0 and 1"):
        target.generate(**make_prompt(0), assistant_model=draft, max_new_tokens=4)


@pytest.mark.parametrize(
    "name, layer, reason", [("hy_v4", 0, "has several streams of states"), ("mllama", 1, "did not run in this call")]
)
def test_a_layer_without_a_state_for_each_token_is_refused(name, layer, reason):
    target = FAMILIES[name].build(0)
    draft = build_draft(target, target_layers=[layer])
    with pytest.raises(
        MSDUnsupportedError, match=rf"reads layer {layer} \(counted from 0\) of the target, which {reason}"
    ):
        target.generate(**FAMILIES[name].inputs(0), assistant_model=draft, max_new_tokens=4)


def test_init_from_last_layer_copies_it():
    target = build_target(seed=1, num_kv_heads=2)
    draft = MSDDraftModel.from_target(target, init_from_last_layer=True)
    source = target.get_decoder().layers[-1].state_dict()
    own = draft.layers[0].state_dict()
    assert own.keys() == source.keys() and all(torch.equal(own[name], source[name]) for name in own)
    # The copied layer expects the output of the layers before it; the token's embedding is the best substitute.
    embedding_part, state_part = draft.fc.weight.detach().chunk(2, dim=1)
    assert embedding_part.diagonal().mean() == pytest.approx(1, abs=0.1)
    assert state_part.diagonal().mean() == pytest.approx(0, abs=0.1)
    own["mlp.up_proj.weight"].zero_()
    assert source["mlp.up_proj.weight"].abs().sum() > 0  # a copy


def test_init_from_a_layer_that_does_not_fit_is_refused():
    target = build_target(seed=1)
    with pytest.raises(MSDError, match=r"no weight for .*mlp\.up_proj\.weight.* Do without `init_from_last_layer`"):
        MSDDraftModel.from_target(target, init_from_last_layer=True, intermediate_size=48)


@pytest.mark.parametrize("name", ["paligemma", "qwen2", "mistral"])
def test_copied_norms_of_other_kinds_give_the_same_output(name):
    """Gemma's norms multiply by `1 + weight`, so the copied weights must be converted."""
    target = FAMILIES[name].build(0, "sdpa")
    layer = target.get_decoder().layers[-1]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        torch.nn.init.normal_(norm.weight, std=0.1)
    draft = MSDDraftModel.from_target(target, init_from_last_layer=True)
    states = torch.randn(2, 3, 32, dtype=torch.float64)
    for part in ("input_layernorm", "post_attention_layernorm"):
        expected = getattr(layer, part)(states)
        torch.testing.assert_close(getattr(draft.layers[0], part)(states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_a_last_layer_with_unknown_parts_is_refused_or_not_copied(name, tmp_path):
    target = FAMILIES[name].build(0, FAMILIES[name].attentions[0])
    with pytest.raises(MSDError, match=r"norm\.weight, of which the draft's layer knows nothing"):
        MSDDraftModel.from_target(target, init_from_last_layer=True)
    given = MSDTrainingArguments(str(tmp_path), recipe="recommended", init_from_last_layer=True, use_cpu=True)
    with pytest.raises(MSDError):
        new_draft(target, given)
    draft = new_draft(target, MSDTrainingArguments(str(tmp_path), recipe="recommended", use_cpu=True))
    assert not draft.config.input_layernorm
