"""Published drafts of other kinds load from their own formats, and what is doubtful in them is said."""

from __future__ import annotations

import json
import logging

import golden_sets
import pytest
import tiny
import torch
from golden_drafts import AUX_IDS, checkpoints, weights_of, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from msd_hf import (
    AutoDraft,
    Eagle3DraftConfig,
    Eagle3DraftModel,
    MSDCheckpointError,
    MSDDraftModel,
    MSDUnsupportedError,
)
from msd_hf.draft.auto import draft_class_of
from msd_hf.hook.assistant import load_draft
from msd_hf.hub.card import write_card
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.training import MSDTrainer


FLAT, SPECULATORS = "eagle3_ckpt_flat_midlayer", "eagle3_ckpt_speculators_converted"
EAGLE3 = [name for name in checkpoints() if name.startswith("eagle3")]


def outputs(draft) -> torch.Tensor:
    """A draft's scores after fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    width = draft.reads_of(tiny.build_target(num_layers=7).get_decoder()).width
    states = torch.randn(1, 9, width, generator=generator).to(draft.dtype)
    embeds = torch.randn(1, 9, draft.config.hidden_size, generator=generator).to(draft.dtype)
    with torch.no_grad():
        states = draft(embeds, draft.read_target(states)).last_hidden_state
        return draft.own_head(states if draft.head_norm is None else draft.head_norm(states))


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def doubts(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records if "from_pretrained" in record.getMessage())


@pytest.mark.parametrize("use_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", EAGLE3)
def test_every_weight_of_an_eagle3_checkpoint_is_loaded(name, use_bin, tmp_path):
    draft = AutoDraft.from_pretrained(write_checkpoint(name, tmp_path, use_bin))
    stored = {key.replace("midlayer.", "layers.0."): value for key, value in weights_of(name).items() if key != "t2d"}
    own = draft.state_dict()
    assert isinstance(draft, Eagle3DraftModel) and own.keys() == stored.keys()
    assert all(torch.equal(own[key], value) for key, value in stored.items())
    assert draft.config.visual_positions == (
        "placeholder" if "speculators" in name or "hidden48" in name else "image_embedding"
    )
    ids = draft.config.eagle_aux_hidden_state_layer_ids
    assert ids == (AUX_IDS if "speculators" in name or "layers0" in name else None)
    assert not draft.training


@pytest.mark.parametrize("name", [FLAT, *EAGLE3[-3:], "eagle3_ckpt_flat_target_hidden48"])
def test_round_trip(name, tmp_path):
    draft = AutoDraft.from_pretrained(write_checkpoint(name, tmp_path), dtype=torch.float64)
    draft.generation_config.num_assistant_tokens = 31
    draft.save_pretrained(tmp_path / "ours")
    assert AutoConfig.from_pretrained(tmp_path / "ours").to_dict() == {
        **draft.config.to_dict(),
        "_name_or_path": str(tmp_path / "ours"),
        "architectures": ["Eagle3DraftModel"],
    }
    for load in (AutoDraft.from_pretrained, AutoModel.from_pretrained, Eagle3DraftModel.from_pretrained):
        loaded = load(tmp_path / "ours")
        assert loaded.generation_config.num_assistant_tokens == 31
        torch.testing.assert_close(outputs(loaded), outputs(draft))  # rounds by where weights lie in memory


def test_the_flat_format_and_that_of_speculators_give_the_same_draft(tmp_path):
    flat, other = (AutoDraft.from_pretrained(write_checkpoint(name, tmp_path)) for name in (FLAT, SPECULATORS))
    assert torch.equal(outputs(flat), outputs(other)) and torch.equal(flat.draft_vocab, other.draft_vocab)
    assert other.config.target_name_or_path == "tiny-target-6-layers"


@pytest.mark.parametrize(
    "folder, expected",
    [
        (DRAFT_DIR, {"decouple_visual_tokens": True}),
        ("eagle1_ckpt_text", {"decouple_visual_tokens": False, "fc_bias": True, "attention_bias": False}),
        ("original", {"decouple_visual_tokens": True, "target_model_type": "llava"}),
    ],
)
def test_msd_and_eagle_drafts_have_one_class(folder, expected, tmp_path):
    if folder == "original":
        folder = golden_sets.write_original_checkpoint("draft_weights_llava", tmp_path / "original", "llava")
    elif folder in checkpoints():
        folder = write_checkpoint(folder, tmp_path)
    draft = AutoDraft.from_pretrained(folder)
    assert type(draft) is MSDDraftModel and draft_class_of(folder) is MSDDraftModel
    assert {name: getattr(draft.config, name) for name in expected} == expected


def test_an_eagle_draft_without_and_with_biases(tmp_path):
    folder = write_checkpoint("eagle1_ckpt_text", tmp_path)

    def change(weights):
        del weights["fc.bias"]
        for name in "qkv":
            size = weights[f"layers.0.self_attn.{name}_proj.weight"].shape[0]
            weights[f"layers.0.self_attn.{name}_proj.bias"] = torch.ones(size)

    change_weights(folder, change)
    draft = AutoDraft.from_pretrained(folder)
    assert draft.fc.bias is None and bool((draft.layers[0].self_attn.v_proj.bias == 1).all())


# Conventions.


@pytest.mark.parametrize(
    "name, changes, field, value, said",
    [
        (FLAT, {}, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}, "has no `rope_theta`"),
        (
            "eagle3_ckpt_flat_layers0_own_embed",
            {},
            "eagle_aux_hidden_state_layer_ids",
            [1, 3, 5],
            r"is [0, 2, 4] in `eagle_config`; here and in SGLang",
        ),
        (SPECULATORS, {"norm_before_residual": None}, "norm_before_residual", False, "is missing; speculators takes"),
        (SPECULATORS, {"norm_before_fc": True}, "norm_before_fc", False, "has no `input_norm.weight`: False"),
        ("eagle3_ckpt_speculators_v31", {"fc_norm": False}, "fc_norm", True, "has `fc_norm.0.weight`: True"),
        (FLAT, {"norm_output": True}, "norm_output", True, "in SpecForge the one before it"),
    ],
)
def test_a_reading_that_others_would_not_share_is_named_unless_it_is_given(
    name, changes, field, value, said, tmp_path, caplog
):
    folder = write_checkpoint(name, tmp_path, **changes)
    draft = AutoDraft.from_pretrained(folder)
    assert getattr(draft.config, field) == value
    assert said in doubts(caplog) and f"`{field}`" in doubts(caplog)
    caplog.clear()
    draft = AutoDraft.from_pretrained(folder, **{field: value})
    assert getattr(draft.config, field) == value and f"`{field}`" not in doubts(caplog)


def test_what_leaves_no_doubt_is_loaded_in_silence(tmp_path, caplog):
    for name in EAGLE3:
        if "speculators" in name:
            AutoDraft.from_pretrained(write_checkpoint(name, tmp_path))
    AutoDraft.from_pretrained(write_checkpoint(FLAT, tmp_path, rope_theta=5e5))
    assert not doubts(caplog)


def test_fields_are_overridden_by_name(tmp_path):
    folder = write_checkpoint(FLAT, tmp_path, rope_theta=5e5)
    given = {
        "norm_before_residual": True,
        "visual_positions": "dropped",
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    draft = AutoDraft.from_pretrained(folder, **given)
    assert {name: getattr(draft.config, name) for name in given} == given
    assert draft.config.rope_parameters["rope_theta"] == 5e5


def test_names_of_other_programs(tmp_path):
    """SGLang's older names of the norms, and its name of the norm before a second layer."""
    expected = AutoDraft.from_pretrained(write_checkpoint("eagle3_ckpt_speculators_v31", tmp_path))
    folder = write_checkpoint("eagle3_ckpt_speculators_v31", tmp_path / "old", fc_norm=None, use_aux_norm=True)

    def rename(weights):
        for number, level in enumerate(("low", "mid", "high")):
            weights[f"aux_norm_{level}.weight"] = weights.pop(f"fc_norm.{number}.weight")

    change_weights(folder, rename)
    assert torch.equal(outputs(AutoDraft.from_pretrained(folder)), outputs(expected))
    name = "eagle3_ckpt_speculators_two_layers"
    expected = AutoDraft.from_pretrained(write_checkpoint(name, tmp_path))
    folder = write_checkpoint(name, tmp_path / "old")
    change_weights(
        folder,
        lambda weights: weights.update(
            {"layers.1.hidden_norm.weight": weights.pop("layers.1.input_layernorm.weight")}
        ),
    )
    assert torch.equal(outputs(AutoDraft.from_pretrained(folder)), outputs(expected))


# What is refused.


def put(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda weights: weights.pop("midlayer.mlp.up_proj.weight"), r"missing: layers\.0\.mlp\.up_proj\.weight"),
        (lambda weights: weights.pop("lm_head.weight"), r"there is no matrix lm_head\.weight"),
        (put("midlayer.mlp.more.weight", torch.ones(2, 2)), r"unexpected: layers\.0\.mlp\.more\.weight"),
        (put("norm.weight", torch.ones(63)), r"wrong shape: norm\.weight \(\[63\], expected \[64\]\)"),
        (put("d2t", torch.zeros(96)), r"wrong dtype: d2t"),
        (put("d2t", torch.full((96,), 300)), r"`d2t` .* is no map to the target's vocabulary"),
        (put("d2t", -torch.arange(96)), r"`d2t` .* is no map to the target's vocabulary"),
        (put("fc.weight", torch.zeros(64, 100)), r"`fc\.weight` .* reads 100 numbers"),
        (put("layers.0.mlp.up_proj.weight", torch.ones(2, 2)), "hold a first layer twice"),
    ],
)
def test_weights_that_are_not_those_of_a_draft(change, expected, tmp_path):
    folder = write_checkpoint(FLAT, tmp_path)
    change_weights(folder, change)
    with pytest.raises(MSDCheckpointError, match=expected):
        AutoDraft.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "all"}}, "must be a list of numbers"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}},
            "names 2 hidden states, but `fc.weight` reads 3",
        ),
        ({"target_hidden_size": 60}, "reads 192 numbers, which are no whole number of hidden states of width 60"),
    ],
)
def test_configurations_that_are_not_those_of_a_draft(changes, expected, tmp_path):
    with pytest.raises(MSDCheckpointError, match=expected):
        AutoDraft.from_pretrained(write_checkpoint(FLAT, tmp_path, **changes))


def test_another_kind_is_named(tmp_path):
    eagle3 = write_checkpoint(FLAT, tmp_path)
    with pytest.raises(MSDCheckpointError, match=r"is an EAGLE-3 draft, expected an MSD draft: `msd_hf\.AutoDraft"):
        MSDDraftModel.from_pretrained(eagle3)
    with pytest.raises(MSDCheckpointError, match=r"is an MSD draft, expected an EAGLE-3 draft"):
        Eagle3DraftModel.from_pretrained(DRAFT_DIR)
    with pytest.raises(MSDCheckpointError, match=r"is an EAGLE draft, expected an EAGLE-3 draft"):
        Eagle3DraftModel.from_pretrained(write_checkpoint("eagle1_ckpt_text", tmp_path))


def test_a_model_that_is_no_draft(tmp_path):
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for folder, expected in (
        (tmp_path, r"is no draft of a known kind .* its model_type, 'llama'\."),
        (TARGET_DIR, r"Give the draft's folder or repository, not the target's\."),
    ):
        assert draft_class_of(folder) is None
        with pytest.raises(MSDCheckpointError, match=expected):
            AutoDraft.from_pretrained(folder)
    with pytest.raises(OSError, match="nothing"):
        AutoDraft.from_pretrained(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"call `AutoDraft\.from_pretrained"):
        AutoDraft()


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"visual_positions": "all"}, "visual_positions"),
        ({"eagle_aux_hidden_state_layer_ids": []}, "at least one hidden state"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}, "name each layer once"),
        ({"target_hidden_size": 32}, "needs `has_own_embedding`"),
        ({"target_hidden_size": 32, "has_own_embedding": True}, '"image_embedding" for a draft of another width'),
        ({"norm_output": "yes"}, "norm_output"),
    ],
)
def test_fields_of_a_configuration(fields, expected):
    with pytest.raises(ValueError, match=expected):
        Eagle3DraftConfig(hidden_size=64, num_attention_heads=4, **fields)


def test_a_draft_is_loaded_by_its_name_beside_a_target(tmp_path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    target = tiny.build_target()
    draft = load_draft(write_checkpoint(FLAT, tmp_path), target)
    assert isinstance(draft, Eagle3DraftModel) and draft.dtype == target.dtype


def test_saved_files_name_no_folder_of_this_machine(tmp_path):
    draft = AutoDraft.from_pretrained(write_checkpoint("eagle3_ckpt_flat_layers0_own_embed", tmp_path / "secret"))
    draft.save_pretrained(tmp_path / "ours")
    assert "secret" not in (tmp_path / "ours" / "config.json").read_text()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "eagle3_draft"


def test_convert_and_card(run, tmp_path):
    folder = write_checkpoint("eagle3_ckpt_flat_layers0_own_embed", tmp_path)
    code, _, err = run("convert", folder, tmp_path / "ours")
    assert code == 0, err
    expected = AutoDraft.from_pretrained(folder)
    converted = AutoDraft.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(outputs(converted), outputs(expected))
    code, _, err = run("convert", folder, tmp_path / "ours")
    assert code == 1 and "--overwrite" in err
    assert run("convert", folder, tmp_path / "ours", "--overwrite")[0] == 0
    card = write_card(tmp_path / "ours").read_text()
    assert "hidden states [1, 3, 5] of the target" in card and "msd_hf.AutoDraft.from_pretrained" in card
    code, _, err = run("export", tmp_path / "ours", tmp_path / "vllm", "--to", "vllm")
    assert code == 1 and "is no MSD draft, for which the plugin is" in err


@pytest.mark.parametrize(
    "change, expected",
    [
        (put("imadpt.q", torch.ones(2, 64)), r"`imadpt\.q` has the shape \[2, 64\], expected"),
        (put("imadpt.q", torch.ones(1, 4, 16)), r"`num_queries` must be a number from 2"),
        (put("imadpt.q", torch.ones(2, 2, 16)), r"wrong shape: imadpt\.q \(\[2, 2, 16\], expected \[2, 4, 16\]\)"),
        (lambda weights: weights.pop("imadpt.o_proj.weight"), r"missing: imadpt\.o_proj\.weight"),
        (lambda weights: weights.pop("img_fc.bias"), r"missing: img_fc\.bias"),
    ],
)
def test_weights_that_are_not_those_of_a_vispec_draft(change, expected, tmp_path):
    folder = write_checkpoint("vispec_ckpt_llava", tmp_path)
    change_weights(folder, change)
    with pytest.raises(MSDCheckpointError, match=expected):
        AutoDraft.from_pretrained(folder)


@pytest.mark.parametrize("name", ["vispec_ckpt_llava", "vispec_ckpt_qwen2_5_vl"])
def test_convert_a_vispec_draft(name, run, tmp_path):
    folder = write_checkpoint(name, tmp_path, use_bin=name == "vispec_ckpt_llava")
    code, _, err = run("convert", folder, tmp_path / "ours")
    assert code == 0, err
    draft = AutoDraft.from_pretrained(tmp_path / "ours")
    own, stored = draft.state_dict(), weights_of(name)
    assert own.keys() == stored.keys() - {"embed_tokens.weight"} and draft.config.num_queries == 2
    assert all(torch.equal(value, stored[key]) for key, value in own.items())
    assert "few vectors of each image" in write_card(tmp_path / "ours").read_text()
    assert run("convert", folder, tmp_path / "ours", "--overwrite")[0] == 0


def test_the_trainer_names_the_kind_of_its_arguments():
    target = tiny.build_target(num_layers=7)
    with pytest.raises(
        MSDUnsupportedError, match="is an EAGLE-3 draft, and the arguments are for an MSD draft: set `draft_kind` to"
    ):
        MSDTrainer(model=Eagle3DraftModel.from_target(target), target=target)
