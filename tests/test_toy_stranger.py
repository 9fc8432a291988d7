"""A second target of the toy world, unlike the bundled one, for which a draft can be trained as for a user's model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from msd_hf import MSDDraftModel
from msd_hf.prompts import build_chat_inputs
from msd_hf.target.support import check_target
from msd_hf.toy import TARGET_DIR, make_prompts, make_samples
from msd_hf.toy.stranger import IMAGE_TOKEN, build_stranger, build_stranger_processor
from msd_hf.toy.target import collate_samples, encode_sample
from msd_hf.training.data.conversations import load_conversations
from msd_hf.training.data.encoding import ConversationEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger")
    build_stranger(folder, vision_steps=2, steps=2, batch_size=2, num_samples=20, prompts_per_kind=1)
    return folder


@pytest.fixture(scope="module")
def target(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "target")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder / "target")


def test_is_unlike_the_bundled_target(target, processor):
    check_target(target)
    assert type(target) is LlavaForConditionalGeneration
    text, bundled = target.config.text_config, AutoConfig.from_pretrained(TARGET_DIR).text_config
    assert text.model_type == "qwen2" != bundled.model_type
    assert (text.num_attention_heads, text.num_key_value_heads) == (6, 2)
    attention = target.get_decoder().layers[0].self_attn
    assert attention.q_proj.weight.shape == (96, 96) and attention.k_proj.weight.shape == (32, 96)
    assert text.hidden_size != bundled.hidden_size and text.num_hidden_layers != bundled.num_hidden_layers
    other = AutoProcessor.from_pretrained(TARGET_DIR)
    assert len(processor.tokenizer) == text.vocab_size == 700 != len(other.tokenizer)
    assert processor.tokenizer.bos_token is None and processor.tokenizer.eos_token == "<|im_end|>"
    assert target.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert not set(processor.tokenizer.all_special_tokens) & set(other.tokenizer.all_special_tokens)
    assert processor.image_processor.size != other.image_processor.size


def test_chat_template_is_chatml_without_generation_marks(processor):
    assert "generation %}" not in processor.chat_template.replace("add_generation_prompt", "")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
        {"role": "user", "content": "And now?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE_TOKEN}What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA star.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )
    own_system = [{"role": "system", "content": "Be kind."}, *messages[2:]]
    assert "helpful" not in processor.apply_chat_template(own_system)


def test_an_image_is_seen(target, processor):
    prompts = make_prompts("test", 2, 0, "describe")
    logits = []
    for prompt in prompts:
        inputs = build_chat_inputs(processor, prompt.messages, [prompt.image])
        assert (inputs["input_ids"] == target.config.image_token_id).sum() == 16
        assert inputs["pixel_values"].shape == (1, 3, 80, 80)
        inputs["input_ids"] = inputs["input_ids"][:, :30]
        inputs["attention_mask"] = inputs["attention_mask"][:, :30]
        logits.append(target(**inputs).logits[0, -1])
    assert not torch.allclose(*logits, atol=1e-4)


def test_only_answers_and_their_ends_are_learnt(processor):
    encoder = ConversationEncoder(processor)
    for sample in (*make_samples("train", 1, 0, "visual"), *make_samples("train", 1, 0, "text")):
        features = collate_samples([encode_sample(encoder, sample)], 0)
        labels = features["labels"][0]
        answers = [turn["value"] for turn in sample["conversations"] if turn["from"] == "gpt"]
        assert processor.tokenizer.decode(labels[labels >= 0]) == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert ("pixel_values" in features) == ("scene" in sample)
        if "pixel_values" in features:
            assert features["pixel_values"].shape == (1, 3, 80, 80)


def test_saved_processor_is_the_one_that_was_built(processor):
    built = build_stranger_processor()
    assert built.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    text = "Zürich: 2 <red> stars, 10 €!"
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text and ids == built.tokenizer(text)["input_ids"]


def test_data_is_ready_for_the_training_command(folder, target, processor):
    data = folder / "data"
    parts = {name: load_conversations(data / f"{name}.json") for name in ("text", "visual", "train", "test")}
    assert len(parts["text"]) + len(parts["visual"]) == len(parts["train"]) == 20
    assert {bool(one.images) for one in parts["text"]} == {False}
    assert {len(one.images) for one in parts["visual"]} == {1}
    train, test = (json.loads((data / f"{name}.json").read_text()) for name in ("train", "test"))
    assert not {sample["id"] for sample in train} & {sample["id"] for sample in test}
    draft = MSDDraftModel.from_target(target)
    assert draft.config.num_key_value_heads == 2
    encoder = ConversationEncoder(processor)
    for part in parts.values():
        for conversation in part:
            assert encoder(conversation)["assistant_mask"].any()
