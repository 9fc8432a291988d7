"""EAGLE-3 drafts are written in the formats of others, with the fields of these formats, and read back equal."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from golden_drafts import checkpoints, weights_of, write_checkpoint
from safetensors.torch import load_file
from test_other_drafts import EAGLE3, outputs
from transformers import LlamaConfig

from msd_hf import AutoDraft, Eagle3DraftConfig, Eagle3DraftModel, MSDUnsupportedError
from msd_hf.draft.eagle3.formats import FLAT, FORMATS, SPECULATORS, check_format, write_format
from msd_hf.hub.card import write_card
from msd_hf.toy import DRAFT_DIR


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
MORE = {
    "two layers": {"num_hidden_layers": 2, "draft_vocab_size": 20, "eagle_aux_hidden_state_layer_ids": [0, 2, 5]},
    "scaled positions": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        "mlp_bias": True,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
    },
    "qwen3": {"qk_norm": True, "head_dim": 16, "norm_before_residual": True, "norm_output": True},
}
# What the flat files of several programs have besides the fields of a LLaMA configuration.
FLAT_FIELDS = {"norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "target_hidden_size"}
FLAT_FIELDS |= {"draft_vocab_size", "eagle_config", "eagle_aux_hidden_state_layer_ids"}


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def draft_of(name, folder):
    if name not in MORE:
        return AutoDraft.from_pretrained(write_checkpoint(name, folder), dtype=torch.float32)
    torch.manual_seed(0)
    draft = Eagle3DraftModel(Eagle3DraftConfig(**SIZES, **MORE[name])).eval()
    if draft.d2t is not None:
        draft.set_draft_vocab(torch.randperm(50)[:20])
    return draft


def known_keys(to):
    """The keys of the published files of a format, at the top and in the layer's part."""
    files = [checkpoints()[name]["config"] for name in EAGLE3 if to.removeprefix("eagle3-") in name]
    top = {key for config in files for key in config}
    layer = {key for config in files for key in config.get("transformer_layer_config", ())}
    return (top | FLAT_FIELDS | LlamaConfig().to_dict().keys() if to == FLAT else top), layer


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", [*EAGLE3, *MORE])
def test_written_and_read_back(name, to, tmp_path):
    draft = draft_of(name, tmp_path)
    if (name, to) == ("qwen3", FLAT):
        with pytest.raises(MSDUnsupportedError, match="`qk_norm`"):
            write_format(draft, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()
        return
    write_format(draft, tmp_path / "out", to)
    read = AutoDraft.from_pretrained(tmp_path / "out", visual_positions=draft.config.visual_positions)
    if name in EAGLE3 and "d2t" in weights_of(name):
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(written["t2d"], weights_of(name)["t2d"])
    weights = read.state_dict()
    assert weights.keys() == draft.state_dict().keys()
    assert all(torch.equal(weights[key], weight) for key, weight in draft.state_dict().items())
    before, after = draft.config.to_dict(), read.config.to_dict()
    differ = {field for field, value in before.items() if after.get(field) != value}
    of_target = {"target_model_type", "target_text_model_type", "target_fingerprint", "target_name_or_path"}
    # The last two: without a setting, widths and positions are these.
    equal_in_effect = {"target_hidden_size", "rope_parameters"}
    assert differ <= {"_name_or_path", "architectures", "transformers_version", "dtype", *of_target, *equal_in_effect}
    assert read.config.target_width == draft.config.target_width
    expected = outputs(draft)
    draft.load_state_dict(weights)  # into the same memory, on which rounding depends
    draft.config = read.config
    assert torch.equal(outputs(draft), expected)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    top, layer = known_keys(to)
    assert written.keys() <= top and written.get("transformer_layer_config", {}).keys() <= layer


def test_readers_of_the_flat_format_agree_on_the_layers(tmp_path):
    """vLLM reads the first entry, which counts hidden states; SGLang the second, which counts layers."""
    draft = draft_of("scaled positions", tmp_path)
    write_format(draft, tmp_path / "out", FLAT)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 4]
    assert written["rope_theta"] == 5e5 and written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "to", "message"),
    [
        ({"visual_positions": "decoupled"}, FLAT, '`visual_positions` is "decoupled"'),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, SPECULATORS, "reads 2 hidden states of the target"),
        ({"fc_bias": True}, FLAT, "its `fc` has a bias"),
        ({"attention_bias": True}, SPECULATORS, "`attention_bias`"),
        ({"qk_norm": True, "mlp_bias": True}, SPECULATORS, "`mlp_bias`"),
    ],
)
def test_what_has_no_place(fields, to, message):
    with pytest.raises(MSDUnsupportedError, match=f"The format '{to}' has no place for this draft: .*{message}"):
        check_format(Eagle3DraftModel(Eagle3DraftConfig(**SIZES, **fields)), to)


def test_the_card_names_the_kind(tmp_path):
    draft_of("two layers", tmp_path).save_pretrained(tmp_path / "draft")
    card = write_card(tmp_path / "draft").read_text()
    for text in ("[EAGLE-3, arXiv 2503.01840]", "- eagle3", "(`eagle3_draft`)", "The draft has a head of its own."):
        assert text in card
    assert "- msd\n" not in card


def test_the_command(run, tmp_path):
    source = write_checkpoint("eagle3_ckpt_speculators_v31", tmp_path)
    code, out, err = run("convert", source, tmp_path / "my draft", "--to", "eagle3-flat")
    assert code == 0, err
    assert "visual_positions='placeholder' is given" in out and '"method": "eagle3"' in err
    assert sorted(path.name for path in (tmp_path / "my draft").iterdir()) == ["config.json", "model.safetensors"]
    back, spec = tmp_path / "back", tmp_path / "spec"
    assert run("convert", tmp_path / "my draft", back)[0] == 0
    assert run("convert", back, spec, "--to", "speculators")[0] == 0
    first, last = (AutoDraft.from_pretrained(folder).state_dict() for folder in (source, spec))
    assert all(torch.equal(last[key], weight) for key, weight in first.items())
    assert run("convert", back, spec, "--to", "speculators")[0] == 1  # it exists
    assert run("convert", back, spec, "--to", "speculators", "--overwrite")[0] == 0
    code, _, err = run("convert", back, source, "--to", "speculators", "--overwrite")
    assert code == 0, err
    (spec / "notes.txt").write_text("mine")
    code, _, err = run("convert", back, spec, "--to", "speculators", "--overwrite")
    assert code == 1 and "notes.txt" in err and (spec / "notes.txt").is_file()
    code, _, err = run("convert", DRAFT_DIR, tmp_path / "no", "--to", "speculators")
    assert code == 1 and "a `MSDDraftModel` is no EAGLE-3 draft" in err and not (tmp_path / "no").exists()
