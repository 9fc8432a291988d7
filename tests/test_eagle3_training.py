"""EAGLE-3 drafts in the trainer: their passes are those of drafting and of speculators, their loss is that of EAGLE-3,
and what comes out generates the target's own tokens."""

from __future__ import annotations

import copy
import json
import logging

import golden_drafts
import pytest
import tiny
import torch
from golden_drafts import ATOL_LOGITS, ATOL_STATES, AUX_IDS
from hybrid_pair import VIDEO, VISION_START, make_processor
from test_eagle3_generate import KINDS, draft_of, target_of
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from training_runs import log_history, make_trainer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, TrainerCallback

from msd_hf import AutoDraft, Eagle3DraftModel
from msd_hf.compat import CACHE_NAME
from msd_hf.draft.interface import VISUAL_POSITIONS, TargetReads
from msd_hf.drafting.growing import GrowingDrafter
from msd_hf.errors import MSDError
from msd_hf.prompts import build_chat_inputs
from msd_hf.target.adapter import TargetAdapter
from msd_hf.training import FeatureCache, MSDTrainingArguments, extract_features
from msd_hf.training.losses import loss_sums
from msd_hf.training.objective import DraftObjective
from msd_hf.training.own_head import OwnHead
from msd_hf.training.rows import draft_rows
from msd_hf.training.unrolling import unrolled_states


EAGLE3 = {"draft_kind": "eagle3", "recipe": "recommended", "unroll_passes": 2}


def reads_of(draft, target) -> TargetReads:
    reads = draft.reads_of(target.get_decoder())
    return TargetReads(reads.layers, reads.hidden_size)


def objective(target, draft, folder, **arguments) -> DraftObjective:
    args = MSDTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", **{"draft_kind": "eagle3", **arguments}
    )
    return DraftObjective(TargetAdapter(target, reads_of(draft, target)), args)


def batch_of(prompt, trained=None):
    ids = prompt["input_ids"]
    trained = torch.ones_like(ids, dtype=torch.bool) if trained is None else trained
    return {
        **prompt,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~trained, -100),
        "numbers": torch.arange(len(ids)),
    }


@pytest.mark.parametrize("policy", VISUAL_POSITIONS)
@pytest.mark.parametrize("kind", ["flat", "speculators", "qwen3"])
@torch.no_grad()
def test_rows_and_passes_are_those_of_drafting(kind, policy, tmp_path):
    """The oracle: the draft's pass over the prompt in generation, then the following tokens one by one."""
    target, draft = target_of(), copy.deepcopy(draft_of(kind))
    draft.config.visual_positions = policy
    whole = tiny.make_prompt(5, num_text=12, images_at=(2, 4))
    length, num_passes = whole["input_ids"].shape[1], 4
    trainer = objective(target, draft, tmp_path)
    batch = batch_of(whole)
    rows = trainer._read_rows(trainer.make_rows(batch, draft.dtype, draft), batch, True, policy)
    passes = list(unrolled_states(draft, rows, num_passes))
    adapter = TargetAdapter(target, draft.reads_of(target.get_decoder()))
    last = length - num_passes - 2  # place of the last token of the prompt
    assert (whole["input_ids"][0, last:] != tiny.IMAGE_TOKEN_ID).all()
    prompt = {**whole, "input_ids": whole["input_ids"][:, : last + 1]}
    drafter = GrowingDrafter(draft, adapter)
    outputs = []
    draft_forward = draft.forward

    def forward(**inputs):
        outputs.append(draft_forward(**{**inputs, "last_row_only": False}))
        return outputs[-1]

    draft.forward = forward
    with adapter.observe() as seen:
        result = target(**prompt, use_cache=True)
    cache = {CACHE_NAME: result.past_key_values}
    prefill = adapter.read_prefill(seen, result, prompt["input_ids"], cache)
    drafter.prefill(prefill, whole["input_ids"][:, last + 1])
    states = outputs[0].last_hidden_state
    num_rows = states.shape[1]
    assert num_rows == int((rows.positions[0] <= last).sum())
    torch.testing.assert_close(passes[0][:, :num_rows], states, atol=2e-6, rtol=0)
    states = states[:, -1:]
    embed = target.get_input_embeddings() if draft.own_embedding is None else draft.own_embedding
    for number in range(1, num_passes):
        token = whole["input_ids"][:, last + number + 1 : last + number + 2]
        states = draft_forward(
            inputs_embeds=embed(token),
            hidden_states=states,
            position_ids=torch.full((1, 1), last + number),
            past_key_values=drafter.cache,
        ).last_hidden_state
        place = num_rows - 1 + number
        torch.testing.assert_close(passes[number][:, place : place + 1], states, atol=2e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["decoupled", "image_embedding"])
def test_a_decoupled_draft_reads_no_states_of_the_target_at_visual_rows(policy):
    draft = copy.deepcopy(draft_of("flat"))
    draft.config.visual_positions = policy
    embeds, states, others = torch.randn(3, 1, 6, 32, dtype=torch.float64)
    visual = torch.tensor([[False, True, True, False, False, True]])
    changed = torch.where(visual.unsqueeze(2), others, states)
    same = torch.equal(draft(embeds, states, visual)[0], draft(embeds, changed, visual)[0])
    assert same == (policy == "decoupled") != draft.reads_visual_states


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in golden_drafts.SETS if "hidden48" not in name])
def test_passes_are_those_of_speculators(name, tmp_path, caplog):
    """`ttt` is from its own training forward; row j of its pass k is row j + k here."""
    caplog.set_level(logging.ERROR)
    values, info = golden_drafts.load(name)
    folder = golden_drafts.write_checkpoint(golden_drafts.checkpoint_of(name), tmp_path)
    fields = {"eagle_aux_hidden_state_layer_ids": AUX_IDS, **golden_drafts.flags_of(name)}
    draft = AutoDraft.from_pretrained(folder, dtype=torch.float64, **fields)
    given = golden_drafts.load("eagle3_inputs")[0]
    ids, aux = given["input_ids_shifted"], given["aux_hidden_states"].double()
    table = given["target_embed_tokens.weight"].double()
    embeds = draft.own_embedding(ids) if draft.own_embedding else nn.functional.embedding(ids, table)
    visual = torch.zeros_like(ids, dtype=torch.bool)
    reads = TargetReads((0, 1, 2), 64)
    rows = draft_rows(embeds, torch.cat([aux, aux[..., :64]], -1), visual, ~visual, reads)
    rows.inputs_embeds = embeds  # the golden ids are shifted already
    num_passes = len(values["ttt_logits"])
    assert num_passes >= 3
    for number, states in enumerate(unrolled_states(draft, rows, num_passes)):
        logits = draft.own_head(states if draft.head_norm is None else draft.head_norm(states))
        size = ids.shape[1] - number
        expected = values["ttt_logits"][number, :size]
        torch.testing.assert_close(logits[0, number:].float(), expected, atol=ATOL_LOGITS, rtol=0)
        if not info["config"]["norm_output"]:
            expected = values["ttt_hidden_prenorm"][number, :size]
            torch.testing.assert_close(states[0, number:].float(), expected, atol=ATOL_STATES, rtol=0)


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_the_loss_is_that_of_eagle3(chunk_size):
    """The target's probabilities among the draft's tokens, where its most likely token is one of them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    goals = torch.randn(10, 5, dtype=torch.float64, generator=generator)
    own = torch.nn.Linear(6, 7, bias=False, dtype=torch.float64)
    target_head = torch.nn.Linear(5, 12, bias=False, dtype=torch.float64)
    tokens = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    names = ("token_loss", "accepted_length_loss")
    sums = loss_sums(states, goals, target_head, chunk_size, names, 1.0, OwnHead(own, tokens))
    expected, hits = 0.0, 0
    for state, goal in zip(states, goals, strict=True):
        scores = target_head(goal).detach()
        if int(scores.argmax()) in tokens:
            log_probs = own(state).log_softmax(-1)
            expected = expected - (scores[tokens].softmax(-1) * log_probs).sum()
            hits += int(tokens[log_probs.argmax()]) == int(scores.argmax())
    assert 0 < sum(int(target_head(goal).argmax()) in tokens for goal in goals) < 10
    torch.testing.assert_close(sums.terms["token_loss"], expected)
    assert int(sums.agreement[0]) == hits and sums.num_rows == 10
    # A drafted token is accepted with the probability that the target gives it among all tokens.
    accepted = torch.minimum(own(states).softmax(-1), target_head(goals).softmax(-1)[:, tokens]).sum(-1)
    torch.testing.assert_close(sums.acceptances["accepted_length_loss"], accepted)
    parts = (states, own.weight)
    got = torch.autograd.grad(sums.terms["token_loss"], parts, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_but_an_own_embedding_learns(kind, tmp_path):
    target, draft = target_of(), copy.deepcopy(draft_of(kind)).train()
    if draft.own_embedding is not None:
        draft.own_embedding.requires_grad_(False)
    prompt = tiny.make_prompt(5, num_text=12, images_at=(2,))
    loss, sums = objective(target, draft, tmp_path, unroll_passes=3)(draft, batch_of(prompt), draft.dtype)
    loss.backward()
    assert set(sums.terms) == {"token_loss"}
    without = [name for name, weight in draft.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == (["embed_tokens.weight"] if draft.own_embedding is not None else [])


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def qwen2_vl(tokenizer):
    """A Qwen2-VL with M-RoPE and 16 tokens an image, and its processor."""
    processor = make_processor(copy.deepcopy(tokenizer))
    number = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    patch = processor.image_processor.patch_size
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": patch}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<image>"),
        video_token_id=number(VIDEO),
        vision_start_token_id=number(VISION_START),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = Qwen2VLForConditionalGeneration(config).eval()
    target.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    target.generation_config.eos_token_id = None
    return target, processor


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llava", {"draft_vocab_size": 60, "visual_positions": "decoupled"}), ("qwen2_vl", {})],
)
def test_train_load_and_generate(family, fields, small_target, toy_processor, training_data, tmp_path):
    target, processor = (small_target, toy_processor) if family == "llava" else qwen2_vl(toy_processor.tokenizer)
    held_out = ConcatDataset([Subset(data, range(4)) for data in training_data.values()])
    arguments = {"max_steps": 12, "curriculum": "mixed", "learning_rate": 1e-2, "eval_prompts": 0, **EAGLE3, **fields}
    trainer = make_trainer(target, processor, training_data, tmp_path, held_out, **arguments)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_token_loss"] < 0.95 * before["eval_token_loss"]
    assert "eval_feature_loss" not in after and after["eval_loss"] == after["eval_token_loss"]
    assert {log["visual_share"] for log in log_history(trainer)} - {0.0, 1.0}
    draft = AutoDraft.from_pretrained(tmp_path)
    assert isinstance(draft, Eagle3DraftModel)
    assert draft.config.draft_vocab_size == fields.get("draft_vocab_size")
    assert draft.config.visual_positions == fields.get("visual_positions", "image_embedding")
    # Two layers are too few for hidden states 2, n // 2 and n - 3; of six these are 2, 3, 3.
    assert draft.config.eagle_aux_hidden_state_layer_ids == ([0, 1, 2] if family == "llava" else [1, 3, 5])
    provenance = json.loads((tmp_path / "training_provenance.json").read_text())
    assert provenance["arguments"]["draft_kind"] == "eagle3" and provenance["finished"]
    target, draft = target.double(), tiny.sized(draft.double().eval())
    for kind in ("text", "visual"):
        messages, images = training_data[kind][0].first_prompt()
        inputs = build_chat_inputs(processor, messages, images)
        inputs = {name: part.double() if part.is_floating_point() else part for name, part in inputs.items()}
        arguments = {**inputs, "max_new_tokens": 16, "do_sample": False}
        with_draft = target.generate(**arguments, assistant_model=draft, return_dict_in_generate=True)
        assert torch.equal(with_draft.sequences, target.generate(**arguments))


def test_the_vocabulary_has_the_frequent_tokens_of_the_answers(small_target, toy_processor, training_data, tmp_path):
    trainer = make_trainer(
        small_target, toy_processor, training_data, tmp_path, draft_vocab_size=20, **{**EAGLE3, "unroll_passes": 1}
    )
    counts = torch.zeros(small_target.config.text_config.vocab_size, dtype=torch.long)
    for conversations in training_data.values():
        for index in range(len(conversations)):
            counts += trainer.encoder.answer_tokens(conversations[index]).bincount(minlength=len(counts))
    chosen = trainer.model.draft_vocab
    rest = counts.clone()
    rest[chosen] = 0
    assert counts[chosen].min() >= rest.max() and len(chosen) == 20
    head = small_target.get_output_embeddings().weight
    assert torch.equal(trainer.model.lm_head.weight, head[chosen].float())  # the recommended recipe starts there


def test_stopped_and_resumed_is_the_same_to_the_bit(small_target, toy_processor, training_data, tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "draft_vocab_size": 60, **EAGLE3}
    whole = make_trainer(small_target, toy_processor, training_data, tmp_path / "whole", **arguments)
    whole.train()
    stopped = make_trainer(
        small_target, toy_processor, training_data, tmp_path / "cut", callbacks=[StopAfter(3)], **arguments
    )
    stopped.train()
    resumed = make_trainer(small_target, toy_processor, training_data, tmp_path / "cut", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    weights = resumed.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())
    with pytest.raises(MSDError, match="draft_vocab_size 60, this run has 50"):
        again = {**arguments, "draft_vocab_size": 50}
        other = make_trainer(small_target, toy_processor, training_data, tmp_path / "cut", **again)
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("policy", [pytest.param("placeholder", marks=pytest.mark.slow), "decoupled"])
def test_cached_and_online_features_train_alike(policy, small_target, toy_processor, training_data, tmp_path):
    arguments = {"max_steps": 3, "curriculum": "mixed", "visual_positions": policy, **EAGLE3}
    online = make_trainer(small_target, toy_processor, training_data, tmp_path / "online", **arguments)
    online.train()
    caches = {}
    for kind, conversations in training_data.items():
        folder = tmp_path / f"{kind}-features"
        settings = {"feature_layers": [-1, 0, 1], "all_hidden_states": policy != "decoupled"}
        extract_features(
            small_target, toy_processor, conversations, folder, max_length=512, storage="float32", **settings
        )
        caches[kind] = FeatureCache(folder)
    cached = make_trainer(small_target, toy_processor, caches, tmp_path / "cached", **arguments)
    cached.train()
    for one, other in zip(log_history(online), log_history(cached), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    if policy == "decoupled":
        with pytest.raises(MSDError, match="`draft_vocab_size` counts the tokens of conversations"):
            make_trainer(small_target, toy_processor, caches, tmp_path, **arguments, draft_vocab_size=20)
        with pytest.raises(MSDError, match=r"`feature_layers` \[-1, 0, 1\] instead of \[0, 1\]"):
            make_trainer(small_target, toy_processor, caches, tmp_path, **arguments, target_layers="0,1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_kind": "eagle4"}, "Unknown draft_kind 'eagle4': choose one of msd, eagle3"),
        ({"draft_kind": "eagle3", "feature_loss_weight": 0.5}, "no hidden states of the target"),
        ({"draft_kind": "eagle3", "init_from_last_layer": True}, "there is `init_from_head`"),
        ({"draft_kind": "eagle3", "decouple_visual_tokens": False}, "`visual_positions` says"),
        ({"draft_kind": "eagle3", "target_layers": "none"}, "`target_layers` cannot be 'none'"),
        ({"draft_kind": "eagle3", "visual_positions": "blurred"}, "must be one of placeholder, image_embedding"),
        ({"draft_kind": "eagle3", "draft_vocab_size": 0}, "`draft_vocab_size` must be at least 1"),
        ({"visual_positions": "pooled"}, "an MSD draft has `decouple_visual_tokens`"),
        ({"draft_vocab_size": 100}, "`msd-hf draft-vocab`"),
        ({"init_from_head": True}, "has no head of its own"),
    ],
)
def test_arguments_that_a_kind_has_no_use_for(arguments, message, tmp_path):
    with pytest.raises(MSDError, match=message):
        MSDTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


def test_too_many_tokens_are_refused(small_target, toy_processor, training_data, tmp_path):
    size = small_target.config.text_config.vocab_size
    with pytest.raises(MSDError, match=f"between 1 and {size:,} tokens"):
        make_trainer(small_target, toy_processor, training_data, tmp_path, draft_vocab_size=size + 1, **EAGLE3)
