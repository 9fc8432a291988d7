"""Training data with several images a sample, and with images of different sizes, in one batch.

What a batch gives must be what each sample gives alone, in features that are cached and in training.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from PIL import Image
from training_runs import build_small_target, log_history, make_trainer
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor, set_seed

from msd_hf.prompts import move_inputs
from msd_hf.target.adapter import TargetAdapter
from msd_hf.toy.dataset import ToySamples
from msd_hf.training import FeatureCache, extract_features, load_conversations
from msd_hf.training.data.encoding import collate_conversations


NUM_SAMPLES = 9
# Images and text tokens of each sample.
ALBUM = ((0, 12), (1, 8), (3, 6), (2, 9))
SIZES = ((60, 40), (30, 70), (50, 50), (90, 20))  # pixels


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "idefics3", "mistral3", "qwen2_vl", "gemma3", "mllama"]
)
def test_a_batch_gives_the_features_of_each_sample_alone(name):
    """Pictures differ in their size and number, and one sample has none."""
    family = FAMILIES[name]
    target = family.build()
    adapter = TargetAdapter(target)
    samples, alone = [], []
    for seed, (num_images, num_text) in enumerate(ALBUM):
        inputs = family.collate([family.prompt(seed, num_images, num_text=num_text)])
        length = inputs["input_ids"].shape[1]
        alone.append(adapter.features(**inputs))
        inputs.pop("attention_mask")
        # As the encoder returns it.
        samples.append({key: value[0] if value.shape == (1, length) else value for key, value in inputs.items()})
    together = adapter.features(**move_inputs(collate_conversations(samples, pad_token_id=0), target))
    for row, expected in enumerate(alone):
        length = expected.hidden_states.shape[1]
        for part in ("inputs_embeds", "hidden_states"):
            got = getattr(together, part)[row, :length]
            torch.testing.assert_close(got, getattr(expected, part)[0], atol=1e-10, rtol=0)


def album(number):
    """A sample of up to three pictures of different sizes."""
    count = 1 + number % 3
    images = [Image.new("RGB", SIZES[(number + place) % 4], (40 * place, 9 * number, 200)) for place in range(count)]
    question = {"from": "human", "value": "<image>\n" * count + "How many objects are there?"}
    answer = {"from": "gpt", "value": f"There are {count + number % 5} red squares and a blue circle."}
    return {"id": f"album {number}", "image": images, "conversations": [question, answer]}


def llava_next(toy_processor):
    """The small LLaVA with the image sizes of LLaVA-NeXT, and its processor."""
    pinpoints = [[72, 144], [144, 72], [144, 144]]
    side = {"height": 72, "width": 72}
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 72}, crop_size=side, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor, toy_processor.tokenizer, 12, "default", toy_processor.chat_template, "<image>", 1
    )
    small = build_small_target(toy_processor).config
    config = LlavaNextForConditionalGeneration.config_class(
        vision_config=small.vision_config,
        text_config=small.text_config,
        image_grid_pinpoints=pinpoints,
        image_token_id=small.image_token_id,
        vision_feature_layer=small.vision_feature_layer,
        vision_feature_select_strategy="default",
    )
    set_seed(0)
    target = LlavaNextForConditionalGeneration(config).eval()
    target.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return target, processor


@pytest.mark.parametrize("kind", ["several images", "several sizes"])
def test_albums_are_extracted_and_trained_on(kind, toy_processor, tmp_path):
    """Batches of four hold samples with and without images. Cached features give the losses of the conversations."""
    if kind == "several images":
        target, processor = build_small_target(toy_processor), toy_processor
    else:
        target, processor = llava_next(toy_processor)
    samples = {"text": ToySamples("train", NUM_SAMPLES, 0, "text"), "visual": [album(n) for n in range(NUM_SAMPLES)]}
    data = {name: load_conversations(part) for name, part in samples.items()}
    cached = {}
    for name, conversations in data.items():
        report = extract_features(target, processor, conversations, tmp_path / name, max_length=512, batch_size=5)
        assert report.num_samples == NUM_SAMPLES and not report.skipped
        cached[name] = FeatureCache(tmp_path / name)
    counts = {int(sample["visual_mask"].sum()) for sample in cached["visual"]}
    assert counts == {36, 72, 108} if kind == "several images" else len(counts) > 4
    losses = []
    for given in (cached, data):
        trainer = make_trainer(
            target, processor, given, tmp_path / "draft", curriculum="mixed", max_steps=2, unroll_passes=2
        )
        trainer.train()
        losses.append([entry["loss"] for entry in log_history(trainer)])
        trainer._set_visual_rows()
        assert max(counts) // 2 < trainer.model.config.trained_visual_rows <= max(counts)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
