"""`from_target` gives a draft for every target that `generate` serves, and refuses others with the same sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES
from test_refusals import CASES, never_running
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    DynamicCache,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3_5MoeConfig,
    SolarOpenConfig,
    T5Config,
)

from msd_hf import MSDDraftConfig, MSDDraftModel, MSDError, MSDUnsupportedError
from msd_hf.training import MSDTrainer


# Rows of the table of refusals that concern the target alone, not the call, the draft or a first forward.
REFUSED_TARGETS = (
    "an encoder-decoder target",
    "a target without decoder or head",
    "cross-attention layers (Llama 3.2 Vision)",
    "layers that are neither full nor sliding attention",
    "a recurrent target",
    "a decoder without `position_ids`",
    "embeddings of another size than hidden states",
)


@pytest.mark.parametrize("refused", [row for row in REFUSED_TARGETS if row in CASES])
def test_what_generate_refuses_is_refused_here_too(refused):
    pair = tiny.pair(0)
    target, draft, _ = CASES[refused](never_running(copy.deepcopy(pair.target)), pair.draft)
    with pytest.raises(MSDUnsupportedError) as of_generate:
        target.generate(torch.tensor([[5, 6]]), assistant_model=draft, max_new_tokens=3)
    with pytest.raises(MSDUnsupportedError) as caught:
        MSDDraftModel.from_target(target)
    assert str(caught.value) == f"{of_generate.value} To make a draft for it all the same, give `check=False`."
    assert MSDDraftModel.from_target(target, check=False).config.hidden_size == 32


class _NoHeads(PreTrainedConfig):
    model_type = "no_heads"

    def __init__(self, **kwargs: Any):
        self.vocab_size, self.hidden_size = 60, 192
        super().__init__(**kwargs)


def test_a_configuration_is_checked_as_far_as_it_can_be():
    with pytest.raises(MSDUnsupportedError, match=r"is an encoder-decoder model.*give `check=False`"):
        MSDDraftConfig.from_target(T5Config())
    config = _NoHeads()
    config.layer_types = ["full_attention", "unheard_of"]
    with pytest.raises(MSDUnsupportedError, match=r"has layers of type unheard_of.*give `check=False`"):
        MSDDraftConfig.from_target(config)
    assert MSDDraftConfig.from_target(config, check=False).hidden_size == 192


@pytest.mark.parametrize(
    "config, width",
    [
        (Qwen3_5MoeConfig(), 8 * 512 + 512),  # eight experts and a shared one
        (SolarOpenConfig(), 8 * 1280 + 1280),
        (OPTConfig(), 3072),
        (GPT2Config(), 4 * 768),
        (GPT2Config(n_inner=100), 100),
        (FalconConfig(), 4 * 4544),
        (GPTJConfig(), 4 * 4096),
        (Gemma3nTextConfig(num_hidden_layers=3, intermediate_size=[64, 96, 96], num_kv_shared_layers=0), 96),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_width_of_the_mlp(config, width):
    assert MSDDraftConfig.from_target(config, check=False).intermediate_size == width
    assert MSDDraftConfig.from_target(config, check=False, intermediate_size=96).intermediate_size == 96


def test_sizes_by_layer_are_those_of_most_layers():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma4TextConfig(
        num_hidden_layers=6, layer_types=kinds, head_dim=16, global_head_dim=32, num_global_key_value_heads=1,
        attention_k_eq_v=True,
    )  # fmt: skip
    before = config.to_dict()
    draft = MSDDraftConfig.from_target(config)
    assert (draft.head_dim, draft.num_key_value_heads, draft.num_attention_heads) == (16, 4, 8)
    assert config.to_dict() == before


def test_heads_of_targets_without_heads():
    config = MSDDraftConfig.from_target(_NoHeads())
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (3, 64, 768)
    config = MSDDraftConfig.from_target(_NoHeads(), num_attention_heads=4)
    assert (config.num_attention_heads, config.head_dim) == (4, 48)


def test_heads_of_odd_width_become_even():
    assert MSDDraftConfig.from_target(GPT2Config(n_embd=36, n_head=4)).head_dim == 10


def test_heads_that_do_not_divide_are_left_out():
    config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    assert MSDDraftConfig.from_target(config, num_attention_heads=3).num_key_value_heads == 3


def test_a_required_size_can_be_given():
    config = PreTrainedConfig(vocab_size=60)
    with pytest.raises(MSDError, match=r"has no hidden_size\. Give what is missing as an argument"):
        MSDDraftConfig.from_target(config)
    assert MSDDraftConfig.from_target(config, hidden_size=64).intermediate_size == 256


@pytest.mark.parametrize("name", ["gemma4_e", "gemma3n", "gemma4_moe"])
def test_layers_are_not_changed_by_making_a_draft(name):
    target = FAMILIES[name].build()
    before = target.config.to_dict()
    MSDDraftModel.from_target(target)
    assert target.config.to_dict() == before


def blip2() -> Blip2ForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = Blip2Config(
        text_config=text.to_dict(),
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        qformer_config={**sizes, "num_hidden_layers": 2, "vocab_size": 60, "encoder_hidden_size": 32},
        num_query_tokens=8,
        image_token_index=5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Blip2ForConditionalGeneration(config).double().eval()


def test_a_target_that_hands_generate_on():
    """The draft of BLIP-2 belongs to the language model inside of it, whose `generate` runs."""
    target = blip2()
    inputs = {"input_ids": torch.tensor([[1] + [5] * 8 + [30, 31, 32]]), "max_new_tokens": 8, "do_sample": False}
    inputs["pixel_values"] = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = target.generate(**inputs)
    for made_for in (target, target.language_model):
        draft = tiny.sized(MSDDraftModel.from_target(made_for))
        assert draft.config.target_model_type == "llama"
        assert target.generate(**inputs, assistant_model=draft).tolist() == expected.tolist()
    with pytest.raises(MSDUnsupportedError, match="hands `generate` on to a language model inside of it"):
        MSDTrainer(target=target, processing_class=object())


def test_a_draft_is_a_plain_attention_layer():
    """Rotary settings for a part of each head, several axes or several kinds of layers are not the draft's."""
    rope = {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 2]}
    for config in (LlamaConfig(rope_parameters=rope), Gemma4TextConfig(), GPT2Config(), Qwen3_5MoeConfig()):
        small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        made = MSDDraftConfig.from_target(config, check=False, head_dim=16, vocab_size=60, **small)
        assert made.rope_parameters["rope_type"] == "default"
        assert not set(made.rope_parameters) & {"partial_rotary_factor", "mrope_section"}
        states = torch.randn(1, 3, 32)
        assert MSDDraftModel(made)(states, states, past_key_values=DynamicCache()).last_hidden_state.isfinite().all()
