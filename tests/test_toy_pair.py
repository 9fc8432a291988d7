"""The bundled pair loads by plain `from_pretrained` and answers; its draft is right often but not always."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from msd_hf import MSDDraftModel
from msd_hf.decoding.running_rows import RunningRows
from msd_hf.evaluation import mean_acceptance_length
from msd_hf.prompts import build_inputs
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts
from msd_hf.toy.turns import has_facts


@pytest.fixture(scope="module")
def pair():
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR)
    return processor, target, MSDDraftModel.from_pretrained(DRAFT_DIR)


def test_is_a_real_llava_of_at_most_12_megabytes(pair):
    _, target, draft = pair
    assert type(target) is LlavaForConditionalGeneration
    assert target.config.vision_config.model_type == "clip_vision_model"
    assert target.config.text_config.model_type == "llama" and target.config.text_config.num_hidden_layers >= 16
    assert target.dtype == draft.dtype == torch.float32
    files = [path for folder in (TARGET_DIR, DRAFT_DIR) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_held_out_answers_are_right_and_identical_with_the_draft(pair):
    processor, target, draft = pair
    prompts = make_evaluation_prompts(prompts_per_kind=1, seed=1)
    lengths, correct, identical = [], 0, 0
    for prompt in prompts:
        inputs = build_inputs(processor, prompt.question, prompt.image)
        arguments = {"max_new_tokens": 140, "do_sample": False}
        alone = target.generate(**inputs, **arguments)
        output = target.generate(**inputs, **arguments, assistant_model=draft, return_dict_in_generate=True)
        identical += output.sequences.tolist() == alone.tolist()
        lengths.append(output.acceptance_lengths[0])
        answer = processor.decode(alone[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += has_facts(answer, prompt.facts)
    assert identical == len(prompts)
    assert correct > 0.6 * len(prompts)
    assert mean_acceptance_length(lengths) > 4
    assert any(length == 1 for sequence in lengths for length in sequence)  # the draft is not always right


def test_slots_of_the_likeliest_path_need_not_move(pair, monkeypatch):
    processor, target, draft = pair
    draft = copy.deepcopy(draft)
    draft.generation_config.update(num_assistant_tokens=24, tree_depth=6, tree_top_k=4)
    in_place = []
    commit = RunningRows.settle

    def record_places(running):
        unsettled = running._unsettled
        if unsettled is not None:
            in_place.append(all(path[-1] == len(path) - 1 for path in unsettled[0].paths))
        commit(running)

    monkeypatch.setattr(RunningRows, "settle", record_places)
    for prompt in make_evaluation_prompts(prompts_per_kind=1, seed=3)[:4]:
        target.generate(
            **build_inputs(processor, prompt.question, prompt.image), assistant_model=draft, max_new_tokens=60
        )
    assert len(in_place) > 8 and sum(in_place) > 0.6 * len(in_place)


def test_the_answer_depends_on_the_picture(pair):
    processor, target, _ = pair
    prompts = make_evaluation_prompts(prompts_per_kind=1, seed=2)
    pictures = [prompt.image for prompt in prompts if prompt.image is not None][:3]
    question = next(prompt.question for prompt in prompts if prompt.kind == "describe")
    answers = {
        processor.decode(target.generate(**build_inputs(processor, question, picture), max_new_tokens=60)[0])
        for picture in pictures
    }
    assert len(answers) == 3
