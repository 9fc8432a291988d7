"""A target with the shapes of llava-1.5-7b: vision tower, vocabulary, 576 visual tokens, but two decoder layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from msd_hf import MSDDraftModel
from msd_hf.evaluation.shapes import shape_config


HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS = 4096, 11008, 32
VOCAB_SIZE, DRAFT_VOCAB_SIZE, IMAGE_TOKEN_ID = 32064, 32000, 32000
NUM_IMAGE_TOKENS = 576


def fill(model: torch.nn.Module, seed: int) -> None:
    """Fills the weights in place with random values large enough that the model tells tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.uniform_(-0.05, 0.05, generator=generator)


@pytest.fixture(scope="module")
def target() -> LlavaForConditionalGeneration:
    config = shape_config("llava-1.5-7b")
    text = config.text_config
    text.num_hidden_layers, text.pad_token_id = 2, 32001
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to_empty(device="cpu").eval()
    fill(model, 0)
    # `to_empty` leaves buffers unset, so they are computed again as their modules do.
    model.model.language_model.rotary_emb.__init__(config=text)
    embeddings = next(m for m in model.model.vision_tower.modules() if hasattr(m, "position_ids"))
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1]).unsqueeze(0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 32001
    return model


@pytest.fixture(scope="module")
def draft(target, tmp_path_factory) -> MSDDraftModel:
    """A draft that is loaded from a folder in the original format. Its layer is the target's first layer, so that some
    candidates are right."""
    folder: Path = tmp_path_factory.mktemp("original")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llava",
                "vocab_size": DRAFT_VOCAB_SIZE,
                "hidden_size": HIDDEN_SIZE,
                "intermediate_size": INTERMEDIATE_SIZE,
                "num_hidden_layers": 1,
                "num_attention_heads": NUM_HEADS,
                "num_key_value_heads": NUM_HEADS,
                "hidden_act": "silu",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pretraining_tp": 1,
                "rope_scaling": None,
                "torch_dtype": "float16",
            }
        )
    )
    layer = target.model.language_model.layers[0]
    weights = {
        f"layers.0.{name}": value.half()
        for name, value in layer.state_dict().items()
        if not name.startswith("input_layernorm")
    }
    generator = torch.Generator().manual_seed(1)
    fusion = 0.01 * torch.randn(HIDDEN_SIZE, 2 * HIDDEN_SIZE, generator=generator)
    fusion[:, :HIDDEN_SIZE] += torch.eye(HIDDEN_SIZE)
    weights["fc.weight"] = fusion.half()
    weights["fc.bias"] = torch.zeros(HIDDEN_SIZE, dtype=torch.float16)
    weights["embed_tokens.weight"] = target.get_input_embeddings().weight[:DRAFT_VOCAB_SIZE].half()
    torch.save(weights, folder / "pytorch_model.bin")
    del weights
    draft = MSDDraftModel.from_pretrained(folder, dtype=torch.float32)
    for path in folder.iterdir():
        path.unlink()
    return draft


@pytest.mark.slow
@pytest.mark.parametrize("with_image", [True, False])
def test_identical_with_the_shapes_of_llava_7b(target, draft, with_image):
    assert draft.config.vocab_size == DRAFT_VOCAB_SIZE and target.config.text_config.vocab_size == VOCAB_SIZE
    assert sum(p.numel() for p in draft.parameters()) > 200e6
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, DRAFT_VOCAB_SIZE, (1, 24), generator=generator)
    inputs = {"input_ids": text}
    if with_image:
        image_ids = torch.full((1, NUM_IMAGE_TOKENS), IMAGE_TOKEN_ID)
        inputs["input_ids"] = torch.cat([text[:, :5], image_ids, text[:, 5:]], dim=1)
        inputs["pixel_values"] = torch.randn(1, 3, 336, 336, generator=generator)
    expected = target.generate(**inputs, max_new_tokens=10)
    output = target.generate(**inputs, max_new_tokens=10, assistant_model=draft, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    new = expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(new) == 10 and len(set(new)) > 3
    assert sum(output.acceptance_lengths[0]) == 9
    print("tokens of each verification:", output.acceptance_lengths[0])
    # The target sees its image: a blank one changes the answer.
    if with_image:
        blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert target.generate(**blank, max_new_tokens=10).tolist() != expected.tolist()
