"""Targets whose decoder finds its positions itself, and attentions of layers with a window."""

from __future__ import annotations

import pytest
import tiny
import torch
from families import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from msd_hf import MSDDraftModel


class WithoutPositions(LlamaForCausalLM):
    """A target that leaves positions to its decoder, which counts the slots of its cache."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_decoder_may_find_its_positions_itself(batch_size):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        eos_token_id=None,
    )
    target = WithoutPositions(config).double().eval()
    draft = tiny.sized(MSDDraftModel.from_target(target).eval())
    inputs = {"input_ids": torch.arange(3, 3 + 7 * batch_size).view(batch_size, 7)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = target.generate(**inputs, max_new_tokens=12)
    assert torch.equal(target.generate(**inputs, max_new_tokens=12, assistant_model=draft), expected)


@pytest.mark.parametrize("window", [4, 7])
def test_attentions_of_a_window_are_those_of_its_slots(window):
    """Each step gives the attention to the slots within the window alone, as the target gives it by itself."""
    family = FAMILIES["mistral"]
    target = family.build(sliding_window=window)
    target.set_attn_implementation("eager")
    draft = tiny.sized(MSDDraftModel.from_target(target).eval())
    inputs = family.inputs(1, num_text=9)
    options = {"max_new_tokens": 8, "output_attentions": True, "return_dict_in_generate": True}
    expected = target.generate(**inputs, **options)
    got = target.generate(**inputs, **options, assistant_model=draft)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.attentions) == len(expected.attentions) == 8
    for step, reference in zip(got.attentions, expected.attentions, strict=True):
        for layer, other in zip(step, reference, strict=True):
            torch.testing.assert_close(layer, other)
