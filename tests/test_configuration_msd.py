"""Drafts are derived from the configurations of targets of every family."""

import pytest
import torch
from families import FAMILIES, HIDDEN_SIZE
from transformers import LlamaConfig, Phi3Config, Qwen2_5_VLConfig

from msd_hf import MSDDraftConfig, MSDDraftModel
from msd_hf.decoders import decoder_of


GEMMAS = ("gemma2", "gemma3", "gemma4", "paligemma")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_fits_its_target(name):
    target = FAMILIES[name].build()
    draft = MSDDraftModel.from_target(target)
    text_config = target.config.get_text_config(decoder=True)
    assert (draft.config.target_model_type, draft.config.target_text_model_type) == (
        target.config.model_type,
        text_config.model_type,
    )
    attention = draft.layers[0].self_attn
    # Models with compressed keys have other projections than a draft. Layers of one model may differ in width.
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    shapes = [
        [getattr(layer.self_attn, projection).weight.shape for projection in projections]
        for layer in decoder_of(target).layers
        if all(getattr(getattr(layer, "self_attn", None), projection, None) is not None for projection in projections)
    ]
    assert not shapes or [getattr(attention, projection).weight.shape for projection in projections] in shapes
    is_qwen2_kind = text_config.model_type.startswith("qwen2")
    assert (attention.q_proj.bias is not None) == draft.config.input_layernorm == is_qwen2_kind
    assert draft.config.hidden_act == ("gelu_pytorch_tanh" if name.startswith(GEMMAS) else "silu")

    embeds, hidden_states = torch.randn(2, 1, 5, HIDDEN_SIZE, dtype=target.dtype)
    states = draft(embeds, hidden_states, torch.tensor([[True, True, False, False, False]])).last_hidden_state
    assert states.shape == (1, 5, HIDDEN_SIZE) and states.dtype == target.dtype
    assert target.get_output_embeddings()(states).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_has_the_rotary_frequencies_of_its_target(name):
    """The draft uses one position dimension even if the target has three, and the frequencies of full attention."""
    target = FAMILIES[name].build()
    rotary = decoder_of(target).rotary_emb
    expected = getattr(rotary, "inv_freq", None)
    if expected is None:
        expected = rotary.full_attention_inv_freq
        assert not torch.equal(expected, rotary.sliding_attention_inv_freq)
    draft = MSDDraftModel.from_target(target)
    if name.startswith("gemma4"):  # full attention rotates a part of wider heads, of which a draft takes the base
        base = target.config.get_text_config().rope_parameters["full_attention"]["rope_theta"]
        size = draft.config.head_dim
        expected = (1 / base ** (torch.arange(0, size, 2, dtype=torch.float) / size)).to(expected)
    assert torch.allclose(draft.rotary_emb.inv_freq.to(expected), expected, rtol=1e-6)


def rope_of(config):
    return MSDDraftConfig.from_target(config).rope_parameters


def test_scaling_of_the_rotary_positions_is_kept():
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
    assert rope_of(LlamaConfig(rope_parameters=dict(yarn))).items() >= yarn.items()
    multimodal = Qwen2_5_VLConfig(text_config={"rope_parameters": {**yarn, "mrope_section": [16, 24, 24]}})
    assert rope_of(multimodal).items() >= yarn.items() and "mrope_section" not in rope_of(multimodal)


def test_a_draft_rotates_whole_heads():
    head_dim, factor = 32, 0.75
    target = Phi3Config(
        hidden_size=128,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 5e4,
            "partial_rotary_factor": factor,
            "short_factor": [1.0] * int(head_dim * factor // 2),
            "long_factor": [1.0] * int(head_dim * factor // 2),
        },
        max_position_embeddings=8192,
        original_max_position_embeddings=4096,
    )
    draft = MSDDraftModel(MSDDraftConfig.from_target(target, vocab_size=8, intermediate_size=8))
    assert draft.config.rope_parameters["rope_theta"] == 5e4
    assert draft.rotary_emb.inv_freq.shape == (head_dim // 2,)
    assert draft(*torch.randn(2, 1, 3, 128)).last_hidden_state.shape == (1, 3, 128)
