"""The draft's forward equals the original implementation, and the model keeps the promises of `PreTrainedModel`."""

import copy

import golden_sets
import pytest
import torch
from transformers import AutoConfig, AutoModel, DynamicCache

from msd_hf import MSDDraftConfig, MSDDraftModel
from msd_hf.tree.settings import TreeSettings


FORWARDS = {
    "draft_forward_llava": ("draft_weights_llava", None),
    "draft_forward_llava_img_at_1": ("draft_weights_llava", None),
    "draft_forward_llava_576": ("draft_weights_llava", None),
    "draft_forward_text": ("draft_weights_llava", None),
    "draft_forward_llava_eagle_baseline": ("draft_weights_llava", None),
    "draft_forward_qwen2vl": ("draft_weights_qwen2vl", 315),
    "draft_forward_qwen2vl_text": ("draft_weights_qwen2vl", 315),
    "draft_forward_qwen2vl_realids": ("draft_weights_qwen2vl", 151655),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORWARDS)
def test_forward_reproduces_the_original(name, dtype, attention, tmp_path):
    weights_name, image_id = FORWARDS[name]
    values, info = golden_sets.load(name)
    draft = golden_sets.load_draft(weights_name, tmp_path, dtype)
    draft.set_attn_implementation(attention)
    draft.config.decouple_visual_tokens = "eagle_baseline" not in name

    length = values["hidden_states"].shape[1]
    if "inputs_embeds_shifted" in values:
        inputs_embeds = values["inputs_embeds_shifted"]
    else:  # only unshifted rows are stored; the chosen token's embedding follows them
        table = golden_sets.load(weights_name)[0]["embed_tokens.weight"]
        inputs_embeds = torch.cat([values["target_inputs_embeds"][:, 1:], table[values["sample_token"]][None]], dim=1)
    num_image = info.get("N_image") or length + 1 - values["prompt_ids"].shape[1]
    visual_mask = golden_sets.shifted_visual_mask(values, image_id, num_image)
    assert visual_mask.shape == (1, length)
    assert visual_mask.any() == ("text" not in name)

    cache = DynamicCache(config=draft.config)
    with torch.no_grad():
        fused = draft.fuse(inputs_embeds.to(dtype), values["hidden_states"].to(dtype), visual_mask)
        output = draft(
            inputs_embeds.to(dtype), values["hidden_states"].to(dtype), visual_mask, past_key_values=cache
        ).last_hidden_state

    def close(got, expected):
        torch.testing.assert_close(got.double(), expected.double(), atol=golden_sets.ATOL, rtol=0)

    close(fused, values["layer_input_f32"])
    close(
        output, values["out_hidden_f64" if "out_hidden_f64" in values and dtype == torch.float64 else "out_hidden_f32"]
    )
    if "k_cache_f32" in values:
        close(cache.layers[0].keys, values["k_cache_f32"])
        close(cache.layers[0].values, values["v_cache_f32"])


def small_config(**overrides):
    fields = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return MSDDraftConfig(**{**fields, **overrides})


def test_owns_fc_and_layers_only():
    draft = MSDDraftModel(small_config())
    assert {name.split(".")[0] for name, _ in draft.named_parameters()} == {"fc", "layers"}
    assert not any("input_layernorm" in name for name, _ in draft.named_parameters())
    kept = MSDDraftModel(small_config(input_layernorm=True, attention_bias=True))
    names = {name for name, _ in kept.named_parameters()}
    assert {"layers.0.input_layernorm.weight", "layers.0.self_attn.q_proj.bias"} <= names
    assert "layers.0.self_attn.o_proj.bias" not in names


def test_only_the_first_layer_goes_without_input_norm():
    names = {name for name, _ in MSDDraftModel(small_config(num_hidden_layers=2)).named_parameters()}
    assert "layers.1.input_layernorm.weight" in names and "layers.0.input_layernorm.weight" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(tmp_path, dtype):
    draft = MSDDraftModel(small_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})).to(dtype)
    draft.generation_config.num_assistant_tokens = 24
    draft.generation_config.tree_depth = 3
    draft.generation_config.tree_top_k = 4
    draft.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (
        MSDDraftModel.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
        MSDDraftModel.from_pretrained(tmp_path, device_map="cpu"),
    ):
        assert type(loaded) is MSDDraftModel and loaded.dtype == dtype and not loaded.training
        assert loaded.config.rope_parameters["rope_theta"] == 5e5
        settings = loaded.generation_config
        assert (settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k) == (24, 3, 4)
        for name, value in draft.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
    assert MSDDraftModel.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MSDDraftConfig)


def test_defaults_of_the_tree(tmp_path):
    """A draft without settings of its own has automatic trees, also after it was saved and loaded. Compiled rounds,
    whose shape is fixed, have trees of a set size."""
    draft = MSDDraftModel(small_config())
    draft.save_pretrained(tmp_path)
    for one in (draft, MSDDraftModel.from_pretrained(tmp_path)):
        settings = one.generation_config
        assert (settings.num_assistant_tokens, settings.tree_depth, settings.tree_top_k) == (None, None, None)
        assert TreeSettings.from_generation_config(settings) == TreeSettings(64, 40, 10, is_auto=True)
        settings.compile = True
        assert TreeSettings.from_generation_config(settings) == TreeSettings(59, 5, 10)
        settings.update(num_assistant_tokens=12, compile=False)
        assert TreeSettings.from_generation_config(settings) == TreeSettings(12, 5, 10)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    draft = MSDDraftModel(small_config(num_hidden_layers=2)).train()
    other = copy.deepcopy(draft)
    other.gradient_checkpointing_enable()
    assert other.is_gradient_checkpointing
    embeds, hidden = torch.randn(2, 2, 7, 32).unbind(0)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    for model in (draft, other):
        model(embeds, hidden, attention_mask=mask).last_hidden_state[mask.bool()].pow(2).sum().backward()
    assert draft.fc.weight.grad.abs().sum() > 0
    for (name, a), b in zip(draft.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_padding_does_not_change_the_other_rows():
    torch.manual_seed(0)
    draft = MSDDraftModel(small_config()).eval()
    embeds, hidden = torch.randn(2, 1, 7, 32).unbind(0)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = draft(embeds, hidden, attention_mask=mask).last_hidden_state[:, :5]
        alone = draft(embeds[:, :5], hidden[:, :5]).last_hidden_state
    torch.testing.assert_close(padded, alone)
