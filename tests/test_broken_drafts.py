"""A damaged draft gives one error that names the file, before memory is allocated for it; nothing in it is run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

from msd_hf import MSDCheckpointError, MSDDraftConfig, MSDDraftModel
from msd_hf.draft.limits import INTEGER_LIMITS
from msd_hf.toy import DRAFT_DIR


sys.path.append(str(Path(__file__).parents[1] / "examples" / "studies"))

import fuzz_drafts


CONFIG, SETTINGS, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound draft."""
    return Path(shutil.copytree(DRAFT_DIR, tmp_path / "draft"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(folder: Path, **arguments: Any) -> str:
    """The error of loading a damaged draft. It is one line and names the folder."""
    with pytest.raises(MSDCheckpointError) as caught:
        MSDDraftModel.from_pretrained(folder, **arguments)
    message = str(caught.value)
    assert folder.name in message and "\n" not in message and len(message) < 2000
    return message


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


# Numbers.


@pytest.mark.parametrize("name", INTEGER_LIMITS)
def test_every_integer_of_a_configuration_has_limits(name, folder):
    least, most = INTEGER_LIMITS[name]
    for value in (least - 1, most + 1, 10**400, 1.5, float("nan"), "4", True, [1]):
        edit(folder / CONFIG, **{name: value})
        message = refusal(folder)
        assert name in message and CONFIG in message
    for value in (least - 1, most + 1):
        with pytest.raises(ValueError, match=name):
            MSDDraftConfig(**{name: value})


@pytest.mark.parametrize(
    "name, values",
    {
        "rms_norm_eps": [0, -1e-5, 2, float("inf"), float("nan"), "1e-5", None, True, 10**400],
        "initializer_range": [-1, float("nan"), "x"],
        "attention_dropout": [-0.1, 1.1, float("inf")],
        "hidden_act": ["", "foo", 3, None, []],
        "dtype": ["foo", "int64", "float8_e4m3fn", "nn", 3, {}],
        "target_layers": [[-1], [1, 1], ["0"], [1024], 3, list(range(65)), [[1]], [True]],
        "eos_token_id": ["x", [2, -7], 1.5, 2**40],
        "attention_bias": ["true", 1, None],
        "num_key_value_heads": [3],
        "head_dim": [33],
        "target_model_type": [5, "x" * 300],
        "is_encoder_decoder": [True],
        "rope_parameters": [
            *(3, "x", [], {"rope_type": "foo"}, {"rope_type": ["yarn"]}, {"rope_type": "linear"}),
            *({"rope_type": "longrope", "short_factor": [1.0] * 16}, {"rope_theta": None}),
            *({"rope_type": "linear", "factor": value} for value in (0, -1, float("nan"), float("inf"), "2", None)),
            *({"rope_theta": value} for value in (0, -1, float("inf"), "x", 10**400)),
            *({"rope_type": "longrope", "factor": 2.0, "short_factor": value} for value in (3, [1.0], ["x"] * 16)),
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -4},
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        ],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_of_a_configuration_is_checked(name, values, folder):
    for value in values:
        edit(folder / CONFIG, **{name: value})
        message = refusal(folder)
        expected = "`head_dim` must be even" if name == "head_dim" else name
        assert CONFIG in message and expected in message, (value, message)


def test_auto_classes_give_the_same_error(folder):
    edit(folder / CONFIG, num_hidden_layers=10**6)
    expected = "config.json' is not the configuration.*`num_hidden_layers` must be.*64, got 1000000"
    for load in (AutoModel.from_pretrained, AutoConfig.from_pretrained, MSDDraftConfig.from_pretrained):
        with pytest.raises(MSDCheckpointError, match=expected):
            load(folder)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("tree_top_k", value) for value in (0, -1, 10**5, 10**400, 2.5, "4", True, float("nan"))),
        *(("num_assistant_tokens", value) for value in (0, 10**5, "many")),
        *(("tree_depth", value) for value in (-1, 10**6)),
        *(("suffix_nodes", value) for value in (-1, 10**6)),
        *(("compile", "max-autotune"), ("to_dict", 3), ("compile_config", 7), ("watermarking_config", [1])),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_every_setting_of_the_trees_has_limits(name, value, folder):
    edit(folder / SETTINGS, **{name: value})
    message = refusal(folder)
    assert SETTINGS in message
    if name not in ("compile_config", "watermarking_config"):  # transformers says what is wrong with its own
        assert name in message


def test_candidates_of_a_tree_have_a_limit(folder):
    edit(folder / SETTINGS, tree_top_k=500, tree_depth=400)
    assert "100,250,000 candidates" in refusal(folder)


def test_sizes_are_compared_with_the_file_before_memory_is_allocated(folder, monkeypatch):
    """The largest sizes that a configuration may have would take 100 GB."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    edit(folder / CONFIG, hidden_size=65536, intermediate_size=2**20)
    assert "fc.weight ([128, 256], expected [65536, 131072])" in refusal(folder)
    edit(folder / CONFIG, hidden_size=128, intermediate_size=256, num_hidden_layers=64)
    assert "missing: layers.1." in refusal(folder)
    edit(folder / CONFIG, num_hidden_layers=1, quantization_config={"quant_method": "torchao"}, vocab_size=1)
    edit(folder / CONFIG, hidden_size=65536)
    assert "too few for the" in refusal(folder)


# Files.

JSON = {
    "a list": b"[1]",
    "a string": b'"x"',
    "null": b"null",
    "a number": b"5",
    "empty": b"",
    "cut": b'{"hidden_size": 12',
    "not UTF-8": b'{"a": "\xff"}',
    "a nested object": b'{"a":' * 20000 + b"1" + b"}" * 20000,
    "a field twice": b'{"a": 1, "a": 2}',
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "too large": b'{"a": "' + b"x" * 2**24 + b'"}',
}


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("name", [CONFIG, SETTINGS, INDEX])
def test_a_file_that_is_no_json_object(kind, name, folder):
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(JSON[kind])
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, SETTINGS, WEIGHTS])
def test_something_else_in_place_of_a_file(name, folder):
    path = folder / name
    path.unlink()
    path.mkdir()
    assert f"{name}' is a folder" in refusal(folder)
    path.rmdir()
    path.symlink_to("nowhere")
    assert f"{name}' is a link to nothing" in refusal(folder)
    path.unlink()
    os.mkfifo(path)  # reading it would never end
    assert f"{name}' is no regular file" in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, SETTINGS])
def test_a_file_that_may_not_be_read(name, folder, monkeypatch):
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert f"{name}' is not a JSON file: Permission denied." in refusal(folder)


def test_what_is_missing_stays_an_error_of_transformers(folder):
    for path in (folder / "nowhere", "not a name!"):
        with pytest.raises(OSError):
            MSDDraftModel.from_pretrained(path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        MSDDraftModel.from_pretrained(folder)


def test_unknown_fields_do_not_reach_transformers(folder):
    """transformers reads layer types, windows and the names of other files from the attributes of a configuration."""
    fields = {"layer_types": ["sliding_attention"], "sliding_window": 1, "transformers_weights": "x.bin", "to_dict": 3}
    edit(folder / CONFIG, **fields, text_config={"a": 1}, num_labels=3)
    config = MSDDraftModel.from_pretrained(folder).config
    assert not any(name in vars(config) for name in (*fields, "text_config"))
    assert AutoModel.from_pretrained(folder).config.to_dict() == config.to_dict()


def test_an_adapter_does_not_replace_the_draft(folder, tmp_path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "other")}))
    assert "merge the adapter" in refusal(folder)


# Weights.


@pytest.mark.parametrize("length", [0, 7, 8, 200, 5000, -1])
def test_cut_weights(length, folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    assert f"{WEIGHTS}' is not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("content", [b"garbage" * 100, (2**62).to_bytes(8, "little") + b"{}", b"\x80\x04N."])
def test_weights_that_are_no_safetensors(content, folder):
    (folder / WEIGHTS).write_bytes(content)
    assert f"{WEIGHTS}' is not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_of_a_wrong_dtype(dtype, folder):
    with_weights(folder, lambda weights: weights.update({"fc.weight": weights["fc.weight"].to(dtype)}))
    assert "of the wrong dtype: fc.weight" in refusal(folder)


@pytest.mark.parametrize(
    "kind, content",
    {
        "a list": lambda weights: list(weights.values()),
        "nested": lambda weights: {"state_dict": weights},
        "a number": lambda weights: 5,
        "without names": lambda weights: dict(enumerate(weights.values())),
        "an object": lambda weights: {**weights, "x": {"a": 1}},
        "expanded": lambda weights: {**weights, "fc.weight": torch.zeros(1, 1).expand(128, 256)},
        "sparse": lambda weights: {**weights, "fc.bias": weights["fc.bias"].to_sparse()},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pickles_that_hold_no_weights(kind, content, folder):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(content(weights), folder / PICKLE)
    refusal(folder)


def test_pickled_weights_still_load(folder):
    weights = load_file(folder / WEIGHTS)
    expected = MSDDraftModel.from_pretrained(folder).state_dict()
    (folder / WEIGHTS).unlink()
    view = torch.zeros(2 * len(weights["fc.bias"]))[: len(weights["fc.bias"])].copy_(weights["fc.bias"])
    for zipped in (True, False):
        for stored in (weights, {**weights, "fc.bias": view}, {f"model.{name}": v for name, v in weights.items()}):
            torch.save(stored, folder / PICKLE, _use_new_zipfile_serialization=zipped)
            loaded = MSDDraftModel.from_pretrained(folder).state_dict()
            assert all(torch.equal(loaded[name], value) for name, value in expected.items())


# The index of shards.


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    MSDDraftModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert (tmp_path / "shards" / INDEX).exists()
    return tmp_path / "shards"


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "a/../../outside.safetensors", "{tmp}/outside.safetensors"]
)
def test_an_index_does_not_lead_out_of_its_folder(name, shards, tmp_path):
    index = json.loads((shards / INDEX).read_text())
    shard = index["weight_map"]["fc.weight"]
    shutil.copy(shards / shard, tmp_path / "out.safetensors")
    shutil.move(shards / shard, tmp_path / "outside.safetensors")
    moved = {key: name.format(tmp=tmp_path) if file == shard else file for key, file in index["weight_map"].items()}
    edit(shards / INDEX, weight_map=moved)
    assert "expected the name of a weight file in its own folder" in refusal(shards)


def test_a_link_does_not_lead_out_of_the_folder(shards, tmp_path):
    name = json.loads((shards / INDEX).read_text())["weight_map"]["fc.weight"]
    shutil.move(shards / name, tmp_path / "outside.safetensors")
    (shards / name).symlink_to(tmp_path / "outside.safetensors")
    assert re.search("a link to '.*outside.safetensors', expected a file in its own folder", refusal(shards))
    shutil.move(tmp_path / "outside.safetensors", shards / "within.safetensors")
    (shards / name).unlink()
    (shards / name).symlink_to("within.safetensors")
    MSDDraftModel.from_pretrained(shards)


def test_links_of_the_cache_of_the_hub_are_followed(shards, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(shards.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    MSDDraftModel.from_pretrained(snapshot)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"weight_map": {"fc.weight": "other.safetensors"}}, "there is no such file"),
        ({"weight_map": {"fc.weight": 5}}, "expected the name of a weight file"),
        ({"weight_map": ["fc.weight"]}, "no `weight_map`"),
        ({"weight_map": {}}, "no `weight_map`"),
        ({"metadata": None}, "`metadata`"),
    ],
)
def test_a_broken_index(fields, expected, shards):
    edit(shards / INDEX, **fields)
    assert expected in refusal(shards) and INDEX in refusal(shards)


def test_a_weight_in_two_shards(shards):
    first, second = sorted(shards.glob("model-*"))[:2]
    shutil.copy(first, second)
    assert "another file holds too" in refusal(shards)


# The draft's own vocabulary.


@pytest.mark.parametrize(
    "tokens", [[-1, 5, 7, 9], [5, 5, 7, 9], [9, 5, 7, 3], [5.0, 7.0, 9.0, 11.0], [5, 7, 9], [[5, 7], [9, 11]]], ids=str
)
def test_a_broken_draft_vocabulary(tokens, folder):
    edit(folder / CONFIG, draft_vocab_size=4)
    with_weights(folder, lambda weights: weights.update(draft_vocab=torch.tensor([3, 5, 7, 9])))
    assert MSDDraftModel.from_pretrained(folder).draft_vocab.tolist() == [3, 5, 7, 9]
    with_weights(folder, lambda weights: weights.update(draft_vocab=torch.tensor(tokens)))
    assert "draft_vocab" in refusal(folder)


# Checkpoints of the original repository.


@pytest.mark.parametrize(
    "name, value",
    [
        *(("num_hidden_layers", value) for value in (0, -1, "1", 1.5, 10**6, 10**3000)),
        *(("rope_scaling", value) for value in ("x", [1], {"type": "foo"}, {"type": "linear", "factor": 0})),
        *(("rope_theta", value) for value in ("x", -1, None)),
        *(("hidden_size", value) for value in (0, "128", 10**9)),
        *(("hidden_act", "foo"), ("num_attention_heads", 0), ("model_type", ["llava"]), ("model_type", {})),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_broken_fields_of_an_original_checkpoint(name, value, tmp_path):
    target = fuzz_drafts.toy_target()
    MSDDraftModel.from_target(target, input_layernorm=False).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    original = {key: fields[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    (tmp_path / CONFIG).write_text(json.dumps({**original, "head_dim": 32, "model_type": "llava"}))
    MSDDraftModel.from_pretrained(tmp_path)
    edit(tmp_path / CONFIG, **{name: value})
    assert ("rope" if "rope" in name else name) in refusal(tmp_path)


# Random damages: the study `fuzz_drafts.py` has more of them, each in a process with limits.


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> list[Path]:
    return fuzz_drafts.write_formats(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("number", range(42))
def test_a_damaged_draft_is_refused_or_gives_the_tokens_of_the_target(number, formats, tmp_path):
    folder = tmp_path / "draft"
    _, model_class = fuzz_drafts.make_case(formats, 1, number, folder)
    fuzz_drafts.outcome_of(folder, model_class)
