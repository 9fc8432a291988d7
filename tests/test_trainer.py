"""`MSDTrainer` on a small random LLaVA with the toy world's processor and conversations."""

import json

import pytest
import torch
from torch.nn import functional
from training_runs import NUM_SAMPLES, log_history, make_trainer
from transformers import EarlyStoppingCallback, TrainerCallback

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDDataError, MSDError
from msd_hf.evaluation import mean_acceptance_length
from msd_hf.prompts import build_chat_inputs
from msd_hf.training import RECIPES, FeatureCache, MSDTrainingArguments, Recipe, extract_features, load_conversations
from msd_hf.training.checkpointing import complete_checkpoints


def test_the_loss_of_a_step_is_what_the_paper_says(small_target, toy_processor, training_data, tmp_path):
    """The test computes the paper's formula sample by sample from the target's own outputs."""
    trainer = make_trainer(
        small_target, toy_processor, training_data, tmp_path, max_steps=1, noise=0.0, curriculum="mixed"
    )
    draft = MSDDraftModel(trainer.model.config)
    draft.load_state_dict(trainer.model.state_dict())
    trainer.train()
    draws = [trainer._get_train_sampler().draw(number) for number in range(4)]
    assert {draw.kind for draw in draws} == {"text", "visual"}
    feature_loss, token_loss, num_rows = 0.0, 0.0, 0
    for draw in draws:
        conversation = trainer.train_dataset.datasets[draw.kind][draw.place]
        encoded = toy_processor.apply_chat_template(
            with_images(conversation), tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = encoded["input_ids"][0]
        mask = answer_mask(toy_processor.tokenizer, ids)
        with torch.no_grad():
            output = small_target(**encoded, output_hidden_states=True)
        hidden = output.hidden_states[-1][0]
        embeds = output.hidden_states[0][0]
        rows = []
        for position in range(1, len(ids)):
            if ids[position] == toy_processor.image_token_id:
                rows.append(embeds[position])
            else:
                rows.append(draft.fc(torch.cat([embeds[position], hidden[position - 1]])))
        states = forward_layers(draft, torch.stack(rows))
        for row, state in enumerate(states):
            if mask[row]:
                feature_loss += functional.smooth_l1_loss(state, hidden[row + 1]).item()
                goal = small_target.lm_head(hidden[row + 1]).softmax(-1)
                token_loss -= (goal * small_target.lm_head(state).log_softmax(-1)).sum().item()
                num_rows += 1
    logs = log_history(trainer)[0]
    assert logs["feature_loss"] == pytest.approx(feature_loss / num_rows, rel=1e-4)
    assert logs["token_loss"] == pytest.approx(token_loss / num_rows, rel=1e-4)
    assert logs["loss"] == pytest.approx((feature_loss + 0.1 * token_loss) / num_rows, rel=1e-4)
    assert logs["visual_share"] == sum(draw.kind == "visual" for draw in draws) / 4


def answer_mask(tokenizer, ids):
    """Marks the tokens that the target generates: those after "ASSISTANT:", up to the end-of-sequence token."""
    mask, in_answer = [], False
    for position, token in enumerate(ids.tolist()):
        mask.append(in_answer)
        if token == tokenizer.eos_token_id:
            in_answer = False
        elif tokenizer.decode(ids[: position + 1]).endswith("ASSISTANT:"):
            in_answer = True
    return mask


def with_images(conversation):
    images = iter(conversation.open_images())
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in conversation.messages
    ]


@torch.no_grad()
def forward_layers(draft, states):
    positions = torch.arange(len(states)).unsqueeze(0)
    states = states.unsqueeze(0)
    rotary = draft.rotary_emb(states, position_ids=positions)
    for layer in draft.layers:
        states = layer(states, position_embeddings=rotary, position_ids=positions)
    return states[0]


def test_cached_and_online_features_train_alike(small_target, toy_processor, training_data, tmp_path):
    arguments = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    online = make_trainer(small_target, toy_processor, training_data, tmp_path / "online", **arguments)
    online.train()
    caches = {}
    for kind, conversations in training_data.items():
        folder = tmp_path / f"{kind}-features"
        extract_features(small_target, toy_processor, conversations, folder, max_length=512, storage="float32")
        caches[kind] = FeatureCache(folder)
    cached = make_trainer(small_target, toy_processor, caches, tmp_path / "cached", **arguments)
    cached.train()
    pairs = zip(log_history(online), log_history(cached), strict=True)
    for one, other in pairs:
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["visual_share"] == other["visual_share"]
    assert any(entry["visual_share"] > 0 for entry in log_history(cached))
    for name, weight in online.model.state_dict().items():
        torch.testing.assert_close(weight, cached.model.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_a_cache_for_another_draft_is_refused(small_target, toy_processor, training_data, tmp_path):
    extract_features(small_target, toy_processor, training_data["visual"], tmp_path / "f", max_length=512)
    caches = {"text": None, "visual": FeatureCache(tmp_path / "f")}
    arguments = {"curriculum": "visual"}
    with pytest.raises(MSDError, match="max_length"):
        make_trainer(small_target, toy_processor, caches, tmp_path, max_length=300, **arguments)
    with pytest.raises(MSDError, match="all_hidden_states"):
        make_trainer(small_target, toy_processor, caches, tmp_path, decouple_visual_tokens=False, **arguments)
    with pytest.raises(MSDError, match="feature_layers"):
        make_trainer(small_target, toy_processor, caches, tmp_path, target_layers="0", **arguments)
    with pytest.raises(MSDError, match="cached features and the other one conversations"):
        make_trainer(small_target, toy_processor, {**caches, "text": training_data["text"]}, tmp_path)


def test_gradient_accumulation_equals_a_larger_batch(small_target, toy_processor, training_data, tmp_path):
    histories = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            small_target,
            toy_processor,
            training_data,
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        histories.append(log_history(trainer))
    for one, other in zip(*histories, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True, "unroll_passes": 2},
        {"bf16": True},
        {"dataloader_num_workers": 2},
        {"per_device_train_batch_size": 3, "head_chunk_size": 5},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_do_not_change_the_losses(arguments, small_target, toy_processor, training_data, tmp_path):
    same = ("per_device_train_batch_size", "unroll_passes")
    plain = {key: value for key, value in arguments.items() if key in same}
    runs = []
    for extra in (plain, arguments):
        trainer = make_trainer(small_target, toy_processor, training_data, tmp_path, max_steps=4, **extra)
        trainer.train()
        runs.append(log_history(trainer))
    tolerance = 2e-2 if "bf16" in arguments else 1e-5
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
    if "bf16" in arguments:
        assert runs[0] != runs[1]


def test_the_target_stays_as_it_is(small_target, toy_processor, training_data, tmp_path):
    before = {name: weight.clone() for name, weight in small_target.state_dict().items()}
    flags = [parameter.requires_grad for parameter in small_target.parameters()]
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path, max_steps=2, recipe="recommended")
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in small_target.state_dict().items())
    assert [parameter.requires_grad for parameter in small_target.parameters()] == flags
    assert all(parameter.grad is None for parameter in small_target.parameters())
    changed = [name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, start[name])]
    assert set(changed) == set(start)


def test_evaluation_measures_the_real_tau(small_target, toy_processor, training_data, tmp_path):
    held_out = [training_data[kind][index] for kind in ("text", "visual") for index in range(3)]
    trainer = make_trainer(
        small_target, toy_processor, training_data, tmp_path, eval_dataset=held_out, eval_prompts=2, max_steps=2
    )
    metrics = trainer.evaluate()
    expected = {}
    for kind in ("text", "visual"):
        lengths = []
        for index in range(2):
            messages, images = training_data[kind][index].first_prompt()
            inputs = build_chat_inputs(toy_processor, messages, images)
            output = small_target.generate(
                **inputs,
                assistant_model=trainer.model.eval(),
                do_sample=False,
                max_new_tokens=12,
                return_dict_in_generate=True,
            )
            lengths += output.acceptance_lengths
        expected[kind] = lengths
        assert metrics[f"eval_tau_{kind}"] == pytest.approx(mean_acceptance_length(lengths))
    assert metrics["eval_tau"] == pytest.approx(mean_acceptance_length(expected["text"] + expected["visual"]))
    names = ("loss", "feature_loss", "token_loss", "top1_agreement", "top3_agreement")
    assert all(f"eval_{name}" in metrics for name in names)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_feature_loss"] + 0.1 * metrics["eval_token_loss"])


def test_best_checkpoint_early_stopping_and_provenance(small_target, toy_processor, training_data, tmp_path):
    held_out = [training_data["text"][0], training_data["visual"][0]]
    trainer = make_trainer(
        small_target,
        toy_processor,
        training_data,
        tmp_path,
        eval_dataset=held_out,
        eval_prompts=1,
        max_steps=10,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="tau",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    taus = [entry["eval_tau"] for entry in trainer.state.log_history if "eval_tau" in entry]
    assert trainer.state.best_metric == max(taus)
    # Two evaluations without an improvement are the last ones, if there are so many steps.
    assert len(taus) == trainer.state.global_step == min(taus.index(max(taus)) + 3, 10)
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
    trainer.save_model()
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "training_args.bin",
        "training_provenance.json",
    ]
    best = MSDDraftModel.from_pretrained(tmp_path)
    for name, weight in MSDDraftModel.from_pretrained(trainer.state.best_model_checkpoint).state_dict().items():
        assert torch.equal(weight, best.state_dict()[name])
    provenance = json.loads((tmp_path / "training_provenance.json").read_text())
    assert provenance["command"] and provenance["versions"]["torch"] == torch.__version__
    assert provenance["data"]["text"] == provenance["data"]["visual"] == NUM_SAMPLES
    # The provenance describes the saved weights, which are the best ones and not the last.
    assert provenance["metrics"]["eval_tau"] == max(taus) and provenance["recipe"] == "paper"
    assert provenance["step"] == taus.index(max(taus)) + 1 < trainer.state.global_step
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert provenance["metrics"]["eval_loss"] == losses[provenance["step"] - 1] != losses[-1]  # tau alone may tie
    assert provenance["arguments"]["load_best_model_at_end"] is True


def with_broken_samples(conversations_source):
    samples = [dict(sample) for sample in conversations_source]
    for index in (0, 3, 4):
        samples[index] = {**samples[index], "conversations": samples[index]["conversations"][:1]}
    samples[1] = {**samples[1], "conversations": []}
    return load_conversations(samples)


def test_broken_samples_are_counted_and_replaced(small_target, toy_processor, training_data, tmp_path, raw_samples):
    data = {"text": with_broken_samples(raw_samples["text"]), "visual": None}
    arguments = {"curriculum": "text", "max_steps": 6}
    trainer = make_trainer(small_target, toy_processor, data, tmp_path, **arguments)
    trainer.train()
    assert trainer.provenance()["data"]["skipped"] == {"no assistant turn": 3, "no conversation": 1}
    assert log_history(trainer)[-1]["skipped_samples"] == 4
    with pytest.raises(MSDDataError, match="Sample"):
        make_trainer(small_target, toy_processor, data, tmp_path, strict=True, **arguments).train()
    nothing = {"text": load_conversations([{"id": 1, "conversations": []}] * 8), "visual": None}
    with pytest.raises(MSDError, match="Not one of the 8 text samples can be used: no conversation"):
        make_trainer(small_target, toy_processor, nothing, tmp_path, **arguments).train()


def test_resuming_passes_over_an_incomplete_checkpoint(tmp_path, caplog):
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    assert complete_checkpoints(tmp_path) == []
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 2')
    assert complete_checkpoints(tmp_path) == [str(tmp_path / f"checkpoint-{step}") for step in (10, 5)]
    assert complete_checkpoints(tmp_path / "nothing") == []


def test_broken_held_out_samples_are_counted_apart(small_target, toy_processor, training_data, tmp_path, raw_samples):
    samples = [dict(raw_samples["text"][index]) for index in range(3)]
    whole = load_conversations(samples[1:])
    turn = {"from": "human", "value": "What is </s> for?"}
    samples[0]["conversations"] = [turn, *samples[0]["conversations"][1:]]
    held_out = load_conversations(samples)
    arguments = {"eval_prompts": 2, "eval_max_new_tokens": 4}
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path, eval_dataset=held_out, **arguments)
    metrics = trainer.evaluate()
    assert metrics["eval_skipped_samples"] == 1 and trainer.provenance()["data"]["skipped"] == {}
    expected = trainer.evaluate(whole)
    assert metrics["eval_tau_text"] == expected["eval_tau_text"] and "eval_skipped_samples" not in expected
    strict = make_trainer(
        small_target, toy_processor, training_data, tmp_path, eval_dataset=held_out, strict=True, **arguments
    )
    with pytest.raises(MSDDataError, match="'</s>' is written"):
        strict.evaluate()


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("recipe", ["paper", "recommended"])
def test_stopped_and_resumed_is_the_same_to_the_bit(recipe, small_target, toy_processor, training_data, tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "recipe": recipe}
    whole = make_trainer(small_target, toy_processor, training_data, tmp_path / "whole", **arguments)
    whole.train(resume_from_checkpoint=True)  # there is no checkpoint, so training starts from the beginning
    stopped = make_trainer(
        small_target, toy_processor, training_data, tmp_path / "cut", callbacks=[StopAfter(7)], **arguments
    )
    stopped.train()
    resumed = make_trainer(small_target, toy_processor, training_data, tmp_path / "cut", **arguments)
    read_before_saving = []  # what an evaluation reads that comes before the next save

    class Reads(TrainerCallback):
        def on_train_begin(self, *args, model, **kwargs):
            read_before_saving.append((model.config.trained_visual_rows, model.generation_config.max_visual_rows))

    resumed.add_callback(Reads())
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    weights = resumed.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())
    assert not all(torch.equal(weight, weights[name]) for name, weight in stopped.model.state_dict().items())
    # One picture of the toy world has 36 positions.
    counts = [trainer.provenance()["data"]["visual_positions"] for trainer in (whole, resumed)]
    assert counts[0] == counts[1] and counts[0].keys() == {"36"}
    assert read_before_saving == [(36, "auto")]
    saved = MSDDraftModel.from_pretrained(tmp_path / "cut")
    assert saved.config.trained_visual_rows == 36 and saved.generation_config.max_visual_rows == "auto"


def test_the_trainer_says_how_far_the_run_is(small_target, toy_processor, training_data, tmp_path, monkeypatch):
    seen = []
    passes_at = Recipe.passes_at
    monkeypatch.setattr(Recipe, "passes_at", lambda *args: seen.append(passes_at(*args)) or seen[-1])
    arguments = {"max_steps": 3, "final_unroll_passes": 3, "gradient_accumulation_steps": 2, "curriculum": "text"}
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path, **arguments)
    seen.clear()
    trainer.train()
    assert seen == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("chosen", [None, 9])
def test_a_chosen_number_of_visual_rows_stays(chosen, small_target, toy_processor, training_data, tmp_path):
    draft = MSDDraftModel.from_target(small_target)
    draft.generation_config.max_visual_rows = chosen
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path, model=draft, max_steps=2)
    trainer.train()
    assert draft.config.trained_visual_rows == 36 and draft.generation_config.max_visual_rows == chosen


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recipe": "quick"}, "Unknown recipe 'quick': choose one of paper, recommended"),
        ({"trained_rows": "all"}, "`trained_rows` must be one of answer, drafted, got 'all'"),
        ({"unroll_passes": 0}, "`unroll_passes` must be at least 1"),
        ({"noise": -0.1}, "`noise` must not be negative"),
        ({"target_layers": "one,two"}, "`target_layers` must be numbers with commas"),
        ({"curriculum": "three-stage"}, "Unknown curriculum"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "unroll_passes": 2,
            },
            "`use_reentrant=True` cannot be combined with `unroll_passes` above 1",
        ),
        ({"max_visual_rows": 0}, "`max_visual_rows` must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(MSDError, match=message):
        MSDTrainingArguments(output_dir=str(tmp_path), **arguments)


def test_recipes_fill_in_missing_arguments(tmp_path):
    paper = MSDTrainingArguments(output_dir=str(tmp_path))
    assert (RECIPES["paper"].learning_rate(128), paper.adam_beta1, paper.adam_beta2, paper.weight_decay) == (
        5e-5,
        0.9,
        0.95,
        0.0,
    )
    assert (paper.warmup_steps, paper.max_grad_norm, paper.max_length, paper.num_train_epochs) == (2000, 0.5, 2048, 40)
    assert (paper.feature_loss_weight, paper.token_loss_weight, paper.noise) == (1.0, 0.1, 0.2)
    assert paper.unroll_passes == 1 and not paper.init_from_last_layer and not paper.target_written_answers
    assert paper.layers_of(20) is None
    ours = MSDTrainingArguments(output_dir=str(tmp_path), recipe="recommended", unroll_passes=2)
    assert ours.warmup_steps == 0.05 and ours.get_warmup_steps(600) == 30
    assert RECIPES["recommended"].learning_rate(4096) == 5e-5 and RECIPES["recommended"].learning_rate(128) == 1.6e-3
    assert ours.unroll_passes == 2 and ours.init_from_last_layer and ours.trained_rows == "drafted"


def test_a_missing_data_set_is_refused(small_target, toy_processor, training_data, tmp_path):
    trainer = make_trainer(small_target, toy_processor, {**training_data, "visual": None}, tmp_path)
    with pytest.raises(MSDError, match="needs visual samples and there are none"):
        trainer.train()
    with pytest.raises(MSDError, match="needs the draft's `target`"):
        make_trainer(None, toy_processor, training_data, tmp_path)


@pytest.mark.parametrize("recipe, expected", [("paper", 5e-5), ("recommended", 5e-5 * 64)])
def test_the_default_learning_rate(recipe, expected, small_target, toy_processor, training_data, tmp_path):
    trainer = make_trainer(
        small_target,
        toy_processor,
        training_data,
        tmp_path,
        learning_rate=None,
        lr_scheduler_type="constant",
        recipe=recipe,
    )
    trainer.train()
    assert log_history(trainer)[-1]["learning_rate"] == pytest.approx(expected)


def test_a_target_that_processes_cannot_share_is_refused(small_target, toy_processor, training_data, tmp_path):
    def make(**arguments):
        make_trainer(small_target, toy_processor, training_data, tmp_path, **arguments)

    with pytest.raises(MSDError, match="start several with `accelerate launch`"):
        make(shard_target=True)
    weight = next(small_target.parameters())
    weight.ds_id = 0  # as DeepSpeed marks the weights that it has sharded
    try:
        with pytest.raises(MSDError, match="load the target before you make `MSDTrainingArguments`"):
            make()
    finally:
        del weight.ds_id
    small_target._tp_size = 2
    try:
        with pytest.raises(MSDError, match=r"split by `tp_plan`.*set `shard_target=True`"):
            make()
    finally:
        del small_target._tp_size
    make()
