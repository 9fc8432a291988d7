"""Drafts are trained for a hybrid target: a small random Qwen3.5 with the toy world's pictures and conversations.
The study that trains such a pair continues where it stopped, and measures."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hybrid_pair import PERIOD, make_config, make_processor, make_untrained, measure, stage
from training_runs import log_history, make_trainer

from msd_hf.prompts import build_inputs
from msd_hf.target.adapter import TargetAdapter
from msd_hf.target.layer_kinds import KEEPS_STATES
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts
from msd_hf.toy.dataset import make_sample
from msd_hf.toy.target import collate_samples, deepen, encode_sample
from msd_hf.training.data.encoding import ConversationEncoder, collate_conversations


# The kernels of the gated-delta layers compute in float32 whatever the model's dtype.
KERNEL = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture(scope="module")
def processor(toy_processor):
    return make_processor(copy.deepcopy(toy_processor.tokenizer))


@pytest.fixture
def target(processor):
    return make_untrained(processor, seed=0).eval()


@pytest.fixture(scope="module")
def samples(processor):
    encoder = ConversationEncoder(processor)
    kinds = ("visual", "text", "visual")
    return [encode_sample(encoder, make_sample("train", index, 0, kind)) for index, kind in enumerate(kinds)]


@pytest.mark.skipif(not KEEPS_STATES, reason="refused with a transformers whose layers keep no states for trees")
def test_a_draft_learns_from_pictures_and_text(target, processor, training_data, tmp_path):
    trainer = make_trainer(target, processor, training_data, tmp_path, max_steps=10, curriculum="mixed")
    trainer.train()
    logs = log_history(trainer)
    assert len(logs) == 10 and {log["visual_share"] for log in logs} - {0.0, 1.0}
    first, last = (sum(log["loss"] for log in part) / 3 for part in (logs[:3], logs[-3:]))
    assert last < 0.9 * first


def test_features_of_a_padded_batch_are_those_of_each_sample(target, samples):
    """Each row has its own picture and its own positions (M-RoPE), whatever padding and rows are beside it."""
    assert len({len(sample["input_ids"]) for sample in samples}) == len(samples)
    adapter = TargetAdapter(target)

    def features(rows):
        batch = collate_conversations(rows, pad_token_id=0)
        del batch["assistant_mask"]
        return adapter.features(**batch)

    together = features(samples)
    for row, sample in enumerate(samples):
        alone, length = features([sample]), len(sample["input_ids"])
        torch.testing.assert_close(together.hidden_states[row, :length], alone.hidden_states[0], **KERNEL)
        torch.testing.assert_close(together.inputs_embeds[row, :length], alone.inputs_embeds[0], **KERNEL)
        assert together.visual_mask[row].sum() == (16 if "pixel_values" in sample else 0)


def test_features_are_the_states_of_generation(target, processor):
    """The states that a draft learns from are those that it reads while the target generates."""
    (prompt,) = (prompt for prompt in make_evaluation_prompts(1, seed=0) if prompt.kind == "describe")
    inputs = build_inputs(processor, prompt.question, prompt.image)
    output = target.generate(
        **inputs,
        max_new_tokens=6,
        eos_token_id=None,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    generated = torch.cat([states[-1] for states in output.hidden_states], dim=1)
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    inputs["input_ids"] = output.sequences
    learnt = TargetAdapter(target).features(**inputs).hidden_states
    assert generated.shape[1] == learnt.shape[1] - 1
    torch.testing.assert_close(learnt[:, :-1], generated, **KERNEL)


@torch.no_grad()
def test_deepened_target_computes_the_same(target, processor, samples):
    deep = deepen(target, make_config(processor, 2 * PERIOD), PERIOD).eval()
    kinds = deep.config.text_config.layer_types
    assert kinds == 2 * ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    batch = collate_samples(samples, pad_token_id=0)
    torch.testing.assert_close(deep(**batch).logits, target(**batch).logits, **KERNEL)


def test_a_finished_stage_is_read_again(target, tmp_path):
    first = stage(tmp_path / "shallow", lambda: target)
    second = stage(tmp_path / "shallow", lambda: pytest.fail("It ran again."))
    for name, weight in target.state_dict().items():
        assert torch.equal(first.state_dict()[name], weight) and torch.equal(second.state_dict()[name], weight)


def test_methods_are_measured_on_the_same_prompts(tmp_path):
    arguments = {"num_prompts": 1, "nodes": "4,12", "depth": 3, "repeats": 1, "max_new_tokens": 24, "temperature": 0.0}
    measure(TARGET_DIR.parent, **arguments, seed=0, output=tmp_path)
    methods = json.loads((tmp_path / "report.json").read_text())["methods"]
    assert list(methods) == ["vanilla", "chain-3", "chain", "tree-4", "tree-12", "tree"]
    assert all(figures["agreement"]["identical"] == 1 for figures in methods.values())
    longest = {name: max(map(int, figures["acceptance_histogram"])) for name, figures in methods.items()}
    assert longest["vanilla"] == 1
    assert longest["chain-3"] == longest["tree-4"] == longest["tree-12"] == 3 + 1
    assert longest["chain"] > 4 and longest["tree"] > 4
