"""Whole generations of the original implementation are reproduced by `generate` of a transformers LLaVA."""

import golden_sets
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


IMAGE_TOKEN_ID = 319


class FixedProjector(nn.Module):
    """Replaces vision tower and projector of the original run by their stored output."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, image_features):
        return self.rows


def build_target(rows: torch.Tensor | None) -> LlavaForConditionalGeneration:
    weights, info = golden_sets.load("e2e_llava_target_weights")
    fields = {key: value for key, value in info["config"].items() if key not in ("model_type", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": info["config"]["rope_theta"]}
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    text = LlamaConfig(**fields, rope_parameters=rope)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID)
    target = LlavaForConditionalGeneration(config).double().eval()
    for source, module in (("model.", target.model.language_model), ("lm_head.", target.lm_head)):
        state = {key.removeprefix(source): value for key, value in weights.items() if key.startswith(source)}
        state = {key: value for key, value in state.items() if "rotary_emb" not in key}
        module.load_state_dict(state, strict=True)
    if rows is not None:
        target.model.multi_modal_projector = FixedProjector(rows.double())
    target.generation_config.eos_token_id = 2
    target.generation_config.pad_token_id = 0
    return target


def expand(prompt: list[int], num_image: int) -> torch.Tensor:
    return torch.tensor([[t for p in prompt for t in ([IMAGE_TOKEN_ID] * num_image if p == -200 else [p])]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["e2e_llava", "e2e_llava_576", "e2e_text", "e2e_llava_overshoot", "e2e_llava_eos"])
def test_generation_reproduces_the_original(name, attention, tmp_path):
    values, info = golden_sets.load(name)
    prompt = values["prompt_ids"][0].tolist()
    num_image = info.get("N_image", 9) if -200 in prompt else 0
    inputs, rows = {"input_ids": expand(prompt, num_image)}, None
    if num_image:
        start = prompt.index(-200)
        rows = values.get("image_embeds")
        rows = values["target_inputs_embeds"][:, start : start + num_image] if rows is None else rows
        inputs["pixel_values"] = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    target = build_target(rows)
    target.set_attn_implementation(attention)
    draft = golden_sets.load_draft("e2e_llava_draft_weights", tmp_path)
    draft.generation_config.num_assistant_tokens = info["total_tokens"]
    draft.generation_config.tree_depth = info["depth"]
    draft.generation_config.tree_top_k = info["top_k"]

    max_new_tokens = info["max_new_tokens"]
    output = target.generate(
        **inputs,
        assistant_model=draft,
        max_new_tokens=max_new_tokens,
        eos_token_id=info["eos_token_id"],
        return_dict_in_generate=True,
    )
    generated = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    # The original runs past EOS and past the length limit; only the tokens before are compared.
    expected = info["msd_tokens"][:max_new_tokens]
    if info["eos_token_id"] in expected:
        expected = expected[: expected.index(info["eos_token_id"]) + 1]
    assert generated == expected
    # The original counts a round's root in that round and we count the bonus token, so the first token is not counted.
    left, lengths = len(expected) - 1, []
    for accepted in values["accept_lengths"].tolist():
        if left > 0:
            lengths.append(min(accepted + 1, left))
            left -= lengths[-1]
    assert output.acceptance_lengths == [lengths]
