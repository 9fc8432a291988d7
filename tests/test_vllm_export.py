"""`msd-hf export --to vllm` writes a folder that vLLM reads, or says why the draft cannot be served. Needs no vLLM."""

import json
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from msd_hf import MSDDraftConfig, MSDDraftModel, MSDError, MSDUnsupportedError
from msd_hf.decoders import head_of
from msd_hf.engines import vllm as plugin
from msd_hf.engines.vllm.export import export_draft
from msd_hf.engines.vllm.positions import sequence_positions
from msd_hf.engines.vllm.refusals import check_target_kind
from msd_hf.loading import load_config, load_target
from msd_hf.toy import DRAFT_DIR, TARGET_DIR


def make_draft(**fields):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 60}
    return MSDDraftModel(MSDDraftConfig(**{**sizes, **fields}))


def read(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def test_the_command_writes_the_folder_and_ends_with_the_line_to_type(run, tmp_path):
    folder = tmp_path / "a folder é"
    code, out, err = run("export", DRAFT_DIR, folder, "--to", "vllm", "--target", TARGET_DIR)
    assert code == 0 and "Wrote" in out, err
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    last = err.splitlines()[-1]
    assert last.startswith(f"next: vllm serve {TARGET_DIR} --speculative-config ")
    assert json.loads(last[last.index("{") : last.rindex("}") + 1]) == {
        "method": "eagle",
        "model": str(folder),
        "num_speculative_tokens": 5,
    }


def test_the_configuration_is_one_of_a_llama_with_our_fields_and_holds_no_path(tmp_path):
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    export_draft(draft, tmp_path / "out", vocab_size=512)
    config, weights = read(tmp_path / "out")
    # vLLM leaves architectures as they are that begin with Eagle.
    assert config["model_type"] == "llama" and config["architectures"][0].startswith("Eagle")
    for name in ("hidden_size", "intermediate_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert config[name] == getattr(draft.config, name)
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["input_layernorm"] and config["decouple_visual_tokens"]
    assert str(tmp_path) not in json.dumps(config)
    own = draft.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)


@pytest.mark.parametrize("has_bias", [False, True])
def test_biases_are_those_of_query_key_and_value_alone(has_bias, tmp_path):
    export_draft(make_draft(attention_bias=has_bias), tmp_path / "out")
    config, weights = read(tmp_path / "out")
    assert config["qkv_bias"] is has_bias and not config["attention_bias"]
    assert ("layers.0.self_attn.q_proj.bias" in weights) is has_bias
    assert "layers.0.self_attn.o_proj.bias" not in weights and "fc.bias" in weights


def test_without_an_input_norm_there_is_no_weight_for_it(tmp_path):
    export_draft(make_draft(num_hidden_layers=2, decouple_visual_tokens=False), tmp_path / "out")
    config, weights = read(tmp_path / "out")
    assert not config["input_layernorm"] and not config["decouple_visual_tokens"]
    assert "layers.0.input_layernorm.weight" not in weights and "layers.1.input_layernorm.weight" in weights


def test_a_vocabulary_comes_with_the_targets_rows(run, tmp_path):
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    tokens = [7, 400, 9]
    draft.set_draft_vocab(tokens)
    draft.save_pretrained(tmp_path / "draft")
    code, _, err = run("export", tmp_path / "draft", tmp_path / "none", "--to", "vllm")
    assert code == 1 and "--target is missing" in err and not (tmp_path / "none").exists()
    with pytest.raises(MSDError, match="rows of the target's head"):
        export_draft(draft, tmp_path / "none")
    code, _, err = run("export", tmp_path / "draft", tmp_path / "out", "--to", "vllm", "--target", TARGET_DIR)
    assert code == 0, err
    config, weights = read(tmp_path / "out")
    assert config["draft_vocab_size"] == 3 and config["vocab_size"] == 512
    assert weights["draft_tokens"].tolist() == sorted(tokens)
    assert torch.equal(weights["lm_head.weight"], head_of(load_target(TARGET_DIR)).weight[sorted(tokens)])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_layers": [0, 1]}, r"reads the target's layers \[0, 1\]"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 0.5}},
            "`rope_parameters` have mscale",
        ),
        ({"target_model_type": "gemma3", "target_text_model_type": "gemma3_text"}, "of kind 'gemma3'"),
        ({"target_model_type": "llava", "target_text_model_type": "gemma2"}, "decoder of kind 'gemma2'"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_reason(fields, message, tmp_path):
    with pytest.raises(MSDUnsupportedError, match=message):
        export_draft(make_draft(**fields), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_target_of_another_kind_or_size_is_refused_by_the_command(run, tmp_path, monkeypatch):
    make_draft().save_pretrained(tmp_path / "draft")
    code, _, err = run("export", tmp_path / "draft", tmp_path / "out", "--to", "vllm", "--target", TARGET_DIR)
    assert code == 1 and "hidden size 32 does not match the target's 128" in err
    config = load_config(TARGET_DIR)
    config.text_config.model_type = "cohere"
    with pytest.raises(MSDUnsupportedError, match="decoder of kind 'cohere'"):
        check_target_kind(config)
    code, _, err = run("export", tmp_path / "draft", tmp_path / "out", "--to", "sglang")
    assert code == 2 and "vllm" in err
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_overwritten(run, tmp_path):
    draft = make_draft().to(torch.bfloat16)
    draft.save_pretrained(tmp_path / "draft")
    command = ("export", tmp_path / "draft", tmp_path / "out", "--to", "vllm")
    code, _, err = run(*command)
    assert code == 0, err
    assert read(tmp_path / "out")[0]["dtype"] == "bfloat16"
    assert "add --overwrite" in run(*command)[2]
    assert run(*command, "--overwrite")[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = run(*command, "--overwrite")
    assert code == 1 and "it holds 'notes.txt'" in err
    # A draft is no export: it can be trained on and published.
    code, _, err = run("export", DRAFT_DIR, tmp_path / "draft", "--to", "vllm", "--overwrite")
    assert code == 1 and "not only a draft exported for vLLM" in err
    assert MSDDraftModel.from_pretrained(tmp_path / "draft").config.hidden_size == 32


def test_the_plugin_registers_the_class_once_by_its_name(monkeypatch):
    registered = {}
    registry = types.SimpleNamespace(
        get_supported_archs=lambda: registered.keys(), register_model=registered.setdefault
    )
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    plugin.register()
    plugin.register()
    assert registered == {"EagleMSDDraft": "msd_hf.engines.vllm.model:MSDDraftForVLLM"}


def test_importing_the_plugin_loads_neither_vllm_nor_torch():
    code = "import sys, msd_hf.engines.vllm; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_positions_count_within_each_sequence():
    # Two sequences: the last 3 of 7 tokens, and all of 2.
    metadata = types.SimpleNamespace(
        query_start_loc=torch.tensor([0, 3, 5], dtype=torch.int32), seq_lens=torch.tensor([7, 2], dtype=torch.int32)
    )
    assert sequence_positions(metadata, 5).tolist() == [4, 5, 6, 0, 1]
    with pytest.raises(MSDUnsupportedError, match="another attention backend"):
        sequence_positions(types.SimpleNamespace(), 1)
