"""A budget of visual rows in training: the rows of generation, in feature caches too."""

from __future__ import annotations

import json

import pytest
import torch
from training_runs import build_small_target, log_history, make_trainer

from msd_hf import MSDDraftModel
from msd_hf.drafting.visual_rows import keep_visual_rows
from msd_hf.errors import MSDError
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.dataset import ToySamples
from msd_hf.toy.training_data import write_training_data
from msd_hf.training import FeatureCache, extract_features, load_conversations
from msd_hf.training.features.cache import collate_features, estimate_disk
from msd_hf.training.visual_row_budget import kept_visual_positions, rows_beyond


BUDGET = 5


@pytest.fixture(scope="module")
def training_data():
    return {kind: load_conversations(ToySamples("train", 8, 0, kind)) for kind in ("text", "visual")}


@pytest.fixture(scope="module")
def caches(toy_processor, training_data, tmp_path_factory):
    """Folders of features with and without a budget, and their target."""
    target, folder = build_small_target(toy_processor), tmp_path_factory.mktemp("caches")
    extract = {"max_length": 512, "all_hidden_states": True}
    for name, kind, budget in (("text", "text", None), ("all", "visual", None), ("few", "visual", BUDGET)):
        extract_features(target, toy_processor, training_data[kind], folder / name, max_visual_rows=budget, **extract)
    return folder, target


@pytest.mark.parametrize("budget", [1, 3, 7, 20])
def test_the_rows_are_those_of_generation(budget):
    visual = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    choice = keep_visual_rows(visual, None, budget)
    stays = (~rows_beyond(visual, [budget])[0]).nonzero().squeeze(1)
    assert stays.tolist() == (list(range(40)) if choice is None else choice[0].index[0].tolist())


def test_positions_are_kept_by_the_rows_that_read_them():
    """No row reads the embedding of the first position; row j reads that of position j + 1."""
    visual = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    kept = kept_visual_positions(visual, 2)
    assert (kept[1:] == visual[1:] & ~rows_beyond(visual[1:][None], [2])[0]).all() and kept[1:].sum() == 2
    assert torch.equal(kept_visual_positions(visual, None), visual)


def test_the_cache_holds_fewer_rows_at_their_true_positions(caches):
    folder, _ = caches
    few, everything = FeatureCache(folder / "few"), FeatureCache(folder / "all")
    for sample, whole in zip(few, everything, strict=True):
        for name in ("input_ids", "visual_mask", "assistant_mask"):
            assert torch.equal(sample[name], whole[name])
        kept = sample["kept_visual"]
        assert torch.equal(kept, kept_visual_positions(whole["visual_mask"], BUDGET)) and kept.sum() == BUDGET
        assert torch.equal(sample["visual_embeds"], whole["visual_embeds"][kept[whole["visual_mask"]]])
        # The hidden states before the rows that stay are there.
        stays = ~whole["visual_mask"] | kept
        assert torch.equal(sample["hidden_states"][:-1][stays[1:]], whole["hidden_states"][:-1][stays[1:]])
    assert few.index.num_bytes < 0.7 * everything.index.num_bytes
    assert few.fingerprint != everything.fingerprint


def test_the_disk_need_of_fewer_rows_is_estimated(toy_processor, small_target, training_data, tmp_path):
    arguments = (small_target, toy_processor, training_data["visual"])
    estimate = estimate_disk(*arguments, max_visual_rows=BUDGET)
    extract_features(*arguments, tmp_path / "few", max_visual_rows=BUDGET)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "few").glob("*.safetensors"))
    assert abs(on_disk - estimate.num_bytes) < 0.02 * on_disk


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_cache_with_a_budget_trains_like_the_conversations(
    decoupled, caches, toy_processor, training_data, tmp_path
):
    """The losses are the same, and the draft records how many rows it has seen."""
    folder, target = caches
    arguments = {
        "curriculum": "mixed",
        "unroll_passes": 2,
        "visual_row_dropout": 0.5,
        "decouple_visual_tokens": decoupled,
        "max_visual_rows": BUDGET,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 2,
    }
    cached = {"text": FeatureCache(folder / "text"), "visual": FeatureCache(folder / "few")}
    losses = {}
    for name, data in (("cached", cached), ("conversations", training_data)):
        trainer = make_trainer(target, toy_processor, data, tmp_path / name, **arguments)
        trainer.train()
        losses[name] = [entry["loss"] for entry in log_history(trainer)]
        saved = MSDDraftModel.from_pretrained(tmp_path / name / "checkpoint-2")
        assert saved.config.trained_visual_rows == BUDGET
        assert saved.generation_config.max_visual_rows == "auto"
    assert losses["cached"] == pytest.approx(losses["conversations"], rel=1e-5)


def test_training_that_needs_more_rows_is_refused(caches, toy_processor, tmp_path, run):
    folder, target = caches
    data = {"text": FeatureCache(folder / "text"), "visual": FeatureCache(folder / "few")}
    for needed, words in ((None, "reads all"), (6, "reads 6")):
        with pytest.raises(MSDError, match=rf"at most 5 visual rows .* {words}: set `max_visual_rows` to 5 or less"):
            make_trainer(target, toy_processor, data, tmp_path, max_visual_rows=needed)
    make_trainer(target, toy_processor, data, tmp_path, max_visual_rows=3)
    # The command says so before it looks for the target.
    features = ("--visual-features", folder / "few", "--curriculum", "visual", "--output-dir", tmp_path / "draft")
    status, _, error = run("train", "--target", tmp_path / "none", *features)
    assert status and "at most 5 visual rows" in error and len(error.strip().splitlines()) == 1


def test_a_cache_is_continued_with_its_own_budget_alone(caches, toy_processor, training_data):
    folder, target = caches
    for name, budget, words in (("few", None, "5 instead of None"), ("all", 7, "None instead of 7")):
        with pytest.raises(MSDError, match=f"`max_visual_rows` {words}"):
            extract_features(
                target,
                toy_processor,
                training_data["visual"],
                folder / name,
                max_visual_rows=budget,
                max_length=512,
                all_hidden_states=True,
            )
    with pytest.raises(MSDError, match="`max_visual_rows` must be at least 1, or None for all, got 0"):
        extract_features(target, toy_processor, training_data["visual"], folder / "new", max_visual_rows=0)


def test_caches_from_before_there_were_budgets_are_read(caches):
    """Their index has no such field, and one without a budget is still written so."""
    folder, _ = caches
    assert "max_visual_rows" not in json.loads((folder / "all" / "index.json").read_text())
    assert FeatureCache(folder / "all").index.max_visual_rows is None
    assert "kept_visual" not in FeatureCache(folder / "all")[0]


def test_samples_with_and_without_a_budget_make_one_batch(caches):
    folder, _ = caches
    text, few = FeatureCache(folder / "text")[0], FeatureCache(folder / "few")[0]
    batch = collate_features([text, few], pad_token_id=0)
    assert batch["kept_visual"].sum(1).tolist() == [0, BUDGET] and len(batch["visual_embeds"]) == BUDGET
    assert "kept_visual" not in collate_features([text, FeatureCache(folder / "all")[0]], pad_token_id=0)


def test_extract_takes_a_budget(tmp_path, run):
    write_training_data(tmp_path / "data", samples=4)
    status, out, error = run(
        *("extract", "--target", TARGET_DIR, "--data", tmp_path / "data" / "visual.json", "--max-length", 1000),
        *("--max-visual-rows", 4, "--output", tmp_path / "few"),
    )
    assert status == 0, error
    assert "--max-visual-rows 4 --max-length 1000 --output-dir DRAFT" in " ".join((out + error).split())
    assert FeatureCache(tmp_path / "few")[0]["kept_visual"].sum() == 4
