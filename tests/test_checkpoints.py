"""Checkpoints of the original repository and of this package load from folders, and from the Hub by its client."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import golden_sets
import pytest
import tiny
import torch
from hub_server import HubHandler, run_with_hub, serve_hub
from safetensors.torch import load_file, save_file

from msd_hf import MSDCheckpointError, MSDDraftModel
from msd_hf.tree.settings import TreeSettings


KINDS = {"llava": "draft_weights_llava", "qwen2_vl": "draft_weights_qwen2vl"}
EMBEDDING = "embed_tokens.weight"


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["bin", "safetensors"])
def use_bin(request) -> bool:
    return request.param


def write_weights(folder: Path, weights: dict[str, torch.Tensor], use_bin: bool = True) -> None:
    if use_bin:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of a folder's configuration; `None` removes one."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def outputs(draft: MSDDraftModel) -> torch.Tensor:
    """A draft's outputs for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    embeds, hidden = torch.randn(2, 1, 9, draft.config.hidden_size, generator=generator).to(draft.dtype)
    mask = torch.tensor([[False] * 2 + [True] * 3 + [False] * 4])
    with torch.no_grad():
        return draft(embeds, hidden, mask).last_hidden_state


# Folders.


def test_original_checkpoint(kind, use_bin, tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS[kind], tmp_path, kind, use_bin)
    weights = golden_sets.load(KINDS[kind])[0]
    draft = MSDDraftModel.from_pretrained(folder)
    assert draft.state_dict().keys() == weights.keys() - {EMBEDDING}
    for name, value in draft.state_dict().items():
        assert torch.equal(value, weights[name]), name
    config = draft.config
    assert config.target_model_type == kind
    assert (config.attention_bias, config.input_layernorm) == ((kind == "qwen2_vl"),) * 2
    assert config.target_text_model_type == {"llava": "llama", "qwen2_vl": "qwen2_vl_text"}[kind]
    assert TreeSettings.from_generation_config(draft.generation_config).is_auto  # the checkpoint has no settings
    assert not draft.training


def test_round_trip_to_our_format(kind, use_bin, tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS[kind], tmp_path / "original", kind, use_bin)
    original = MSDDraftModel.from_pretrained(folder, dtype=torch.float64)
    original.generation_config.num_assistant_tokens = 31
    original.save_pretrained(tmp_path / "ours")
    assert EMBEDDING not in load_file(tmp_path / "ours" / "model.safetensors")
    ours = MSDDraftModel.from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.float64 and ours.generation_config.num_assistant_tokens == 31
    assert torch.equal(outputs(original), outputs(ours))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "msd_draft"
    ours.config._name_or_path = original.config._name_or_path
    assert ours.config.to_dict() == original.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "float16"], ids=str)
def test_dtype_argument(kind, dtype, tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS[kind], tmp_path / "original", kind)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    draft = MSDDraftModel.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in draft.parameters()} == {expected}
    weights = golden_sets.load(KINDS[kind])[0]
    assert torch.equal(draft.fc.weight, weights["fc.weight"].to(expected))
    draft.save_pretrained(tmp_path / "ours")
    assert MSDDraftModel.from_pretrained(tmp_path / "ours").dtype == expected
    assert MSDDraftModel.from_pretrained(tmp_path / "ours", dtype=torch.float32).dtype == torch.float32


def test_checkpoint_in_half_precision(tmp_path):
    """Published checkpoints are in half precision. As in any `from_pretrained`, only `dtype="auto"` keeps that."""
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava")
    write_weights(folder, {name: value.half() for name, value in golden_sets.load(KINDS["llava"])[0].items()})
    assert MSDDraftModel.from_pretrained(folder, dtype="auto").dtype == torch.float16
    assert MSDDraftModel.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_generation_config_of_the_target_is_ignored(tmp_path):
    """An original folder may hold a copy of the target's generation config, which the draft ignores."""
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.1}))
    settings = MSDDraftModel.from_pretrained(folder).generation_config
    assert settings.num_assistant_tokens is None and settings.do_sample is None and settings.temperature is None


def test_fields_of_the_configuration_can_be_overridden(tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path / "original", "llava")
    draft = MSDDraftModel.from_pretrained(folder, decouple_visual_tokens=False, attn_implementation="eager")
    assert not draft.config.decouple_visual_tokens and draft.config._attn_implementation == "eager"
    draft.save_pretrained(tmp_path / "ours")
    assert MSDDraftModel.from_pretrained(tmp_path / "ours", decouple_visual_tokens=True).config.decouple_visual_tokens


def test_rope_of_the_original_configuration(tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava")
    edit_config(folder, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    rope = MSDDraftModel.from_pretrained(folder).config.rope_parameters
    assert rope["rope_type"] == "linear" and rope["rope_theta"] == 5e5 and rope["factor"] == 2.0
    edit_config(folder, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    rope = MSDDraftModel.from_pretrained(folder).config.rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize("model_type", KINDS)
def test_every_missing_key_is_named(model_type, use_bin, tmp_path):
    weights = golden_sets.load(KINDS[model_type])[0]
    folder = golden_sets.write_original_checkpoint(KINDS[model_type], tmp_path, model_type, use_bin)
    for missing in weights:
        write_weights(folder, {name: value for name, value in weights.items() if name != missing}, use_bin)
        if missing == EMBEDDING:
            MSDDraftModel.from_pretrained(folder)
            continue
        with pytest.raises(MSDCheckpointError) as caught:
            MSDDraftModel.from_pretrained(folder)
        assert "missing" in str(caught.value) and missing in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["layers.1.mlp.up_proj.weight", "lm_head.weight", "norm.weight", "layers.0.input_layernorm.weight", "fc.scale"],
)
def test_every_unexpected_key_is_named(key, use_bin, tmp_path):
    weights = golden_sets.load(KINDS["llava"])[0]
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava", use_bin)
    write_weights(folder, {**weights, key: torch.zeros(64)}, use_bin)
    with pytest.raises(MSDCheckpointError) as caught:
        MSDDraftModel.from_pretrained(folder)
    assert "unexpected" in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize("model_type", KINDS)
def test_every_wrong_shape_is_named(model_type, use_bin, tmp_path):
    weights = golden_sets.load(KINDS[model_type])[0]
    folder = golden_sets.write_original_checkpoint(KINDS[model_type], tmp_path, model_type, use_bin)
    for wrong in weights:
        value = torch.cat([weights[wrong], weights[wrong]])
        write_weights(folder, {**weights, wrong: value}, use_bin)
        if wrong == EMBEDDING:
            MSDDraftModel.from_pretrained(folder)
            continue
        with pytest.raises(MSDCheckpointError) as caught:
            MSDDraftModel.from_pretrained(folder)
        assert wrong in str(caught.value)


def test_wrong_keys_in_our_format(tmp_path):
    draft = tiny.build_draft(tiny.pair(0).target)
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["other.weight"] = weights.pop("fc.bias")
    write_weights(tmp_path, weights, use_bin=False)
    with pytest.raises(MSDCheckpointError, match=r"missing: fc\.bias; unexpected: other\.weight"):
        MSDDraftModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_configuration(tmp_path):
    """A LLaVA draft that is labelled Qwen2-VL lacks biases and a norm. With two layers in its configuration, it lacks
    the second one's weights."""
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path / "a", "qwen2_vl")
    with pytest.raises(MSDCheckpointError, match=r"layers\.0\.input_layernorm\.weight.*q_proj\.bias"):
        MSDDraftModel.from_pretrained(folder)
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path / "b", "llava")
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(MSDCheckpointError, match=r"layers\.1\."):
        MSDDraftModel.from_pretrained(folder)


def test_folder_without_config(tmp_path):
    write_weights(tmp_path, golden_sets.load(KINDS["llava"])[0])
    with pytest.raises((MSDCheckpointError, OSError), match=r"config\.json"):
        MSDDraftModel.from_pretrained(tmp_path)


def test_folder_without_weights(tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises((MSDCheckpointError, OSError), match=r"pytorch_model\.bin"):
        MSDDraftModel.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["bert", "eagle", "", None])
def test_folder_of_another_kind(model_type, tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava")
    edit_config(folder, model_type=model_type)
    with pytest.raises(MSDCheckpointError, match="not an MSD draft") as caught:
        MSDDraftModel.from_pretrained(folder)
    assert repr(model_type) in str(caught.value)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_configuration_without_a_field(field, tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path, "llava")
    edit_config(folder, **{field: None})
    with pytest.raises(MSDCheckpointError, match=field):
        MSDDraftModel.from_pretrained(folder)


def test_folder_of_a_whole_target(tmp_path):
    tiny.pair(0).target.save_pretrained(tmp_path)
    with pytest.raises(MSDCheckpointError, match="not a draft"):
        MSDDraftModel.from_pretrained(tmp_path)


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("format_", ["torch", "torch legacy", "pickle"])
def test_code_in_a_pickle_is_not_run(format_, tmp_path):
    folder = golden_sets.write_original_checkpoint(KINDS["llava"], tmp_path / "checkpoint", "llava")
    weights = {**golden_sets.load(KINDS["llava"])[0], "extra": RunsCode(tmp_path / "executed")}
    if format_ == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=format_ == "torch")
    with pytest.raises(MSDCheckpointError, match=r"pytorch_model\.bin' is not a file of weights"):
        MSDDraftModel.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()
    if format_ == "torch":  # the file does run its code when it is loaded unsafely
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert (tmp_path / "executed").exists()


# The Hub.


LOAD_ALL = """
import json, sys
from msd_hf import MSDDraftModel
from transformers import AutoConfig, AutoModel

results = {}
for name, load in {
    "someone/MSD-tiny": lambda name: MSDDraftModel.from_pretrained(name),
    "someone/MSD-ours": lambda name: AutoModel.from_pretrained(name),
    "someone/MSD-broken": lambda name: MSDDraftModel.from_pretrained(name),
    "someone/no-config": lambda name: MSDDraftModel.from_pretrained(name),
    "someone/bert": lambda name: MSDDraftModel.from_pretrained(name, revision="main"),
    "someone/missing": lambda name: MSDDraftModel.from_pretrained(name),
}.items():
    try:
        draft = load(name)
        settings = draft.generation_config
        results[name] = [
            type(draft).__name__,
            draft.config.target_model_type,
            settings.num_assistant_tokens,
            sum(value.double().sum().item() for value in draft.state_dict().values()),
        ]
    except Exception as error:
        results[name] = [[cls.__name__ for cls in type(error).__mro__], str(error)]
print(json.dumps(results))
MSDDraftModel.from_pretrained("someone/missing")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[Path, str, list[str]]:
    root = tmp_path_factory.mktemp("hub")
    someone = root / "someone"
    golden_sets.write_original_checkpoint(KINDS["llava"], someone / "MSD-tiny", "llava", use_bin=True)
    draft = MSDDraftModel.from_pretrained(someone / "MSD-tiny")
    draft.generation_config.num_assistant_tokens = 24
    draft.save_pretrained(someone / "MSD-ours")
    golden_sets.write_original_checkpoint(KINDS["qwen2_vl"], someone / "MSD-broken", "llava", use_bin=True)
    golden_sets.write_original_checkpoint(KINDS["llava"], someone / "no-config", "llava")
    (someone / "no-config" / "config.json").unlink()
    golden_sets.write_original_checkpoint(KINDS["llava"], someone / "bert", "bert")
    with serve_hub(root) as (endpoint, requests):
        yield root, endpoint, requests


def test_drafts_from_the_hub(hub, tmp_path):
    root, endpoint, requests = hub
    result = run_with_hub(LOAD_ALL, endpoint, tmp_path)
    assert result.stdout, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    local = MSDDraftModel.from_pretrained(root / "someone" / "MSD-tiny")
    total = sum(value.double().sum().item() for value in local.state_dict().values())
    assert results["someone/MSD-tiny"] == ["MSDDraftModel", "llava", None, pytest.approx(total)]
    assert results["someone/MSD-ours"] == ["MSDDraftModel", "llava", 24, pytest.approx(total)]
    downloaded = {request.replace(HubHandler.commit, "main") for request in requests}
    assert "GET /someone/MSD-tiny/resolve/main/pytorch_model.bin" in downloaded
    assert "GET /someone/MSD-ours/resolve/main/model.safetensors" in downloaded

    kinds, message = results["someone/MSD-broken"]
    assert "MSDCheckpointError" in kinds and "layers.0.self_attn.q_proj.bias" in message
    kinds, message = results["someone/bert"]
    assert "MSDCheckpointError" in kinds and "someone/bert" in message and "'bert'" in message
    kinds, message = results["someone/no-config"]
    assert {"MSDCheckpointError", "OSError"} & set(kinds) and "config.json" in message
    kinds, message = results["someone/missing"]
    assert "OSError" in kinds and "someone/missing" in message
    # The last line of the script raises without a handler.
    assert result.returncode != 0 and "OSError: someone/missing" in result.stderr

    # Once downloaded, a draft loads without the Hub.
    requests.clear()
    again = run_with_hub(f"import os; os.environ['HF_HUB_OFFLINE'] = '1'\n{LOAD_ALL}", endpoint, tmp_path)
    assert again.stdout, again.stderr
    cached = json.loads(again.stdout.splitlines()[-1])
    for name in ("someone/MSD-tiny", "someone/MSD-ours"):
        assert cached[name] == results[name]
    assert requests == []
