"""
Drafts in several formats, and ways to damage them: the cases of `fuzz_drafts.py`.

A damage is a function of a folder with a draft and a random generator. It changes the files, and returns what it did.
"""

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


Damage = Callable[[Path, random.Random], str]

CONFIG, SETTINGS, WEIGHTS, INDEX, PICKLE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
# Values that no number of a file should have.
WRONG = [
    *(-1, 0, 1, 2, 3, 7, 10**5, 10**6, 2**31, 10**9, 10**40, 10**4000, 0.5, 1e308, float("nan"), float("inf")),
    *(True, None, "12", "x" * 300, [], [1], [[-1]], {}, {"a": 1}),
]
WRONG_NAMES = ["", "none", "foo", "int64", "float8_e4m3fn", "dynamic", "linear", "yarn", "longrope", "llama3", "silu"]
SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("attention_dropout", "draft_vocab_size", "target_layers", "eos_token_id", "chunk_size_feed_forward"),
]
NAMES = [
    *("hidden_act", "dtype", "torch_dtype", "model_type", "target_model_type", "target_text_model_type"),
    *("rope_parameters", "rope_scaling", "id2label", "architectures", "quantization_config", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "input_layernorm", "decouple_visual_tokens", "use_cache", "is_encoder_decoder"),
    *("attn_implementation", "layer_types", "sliding_window", "to_dict", "__class__", "transformers_weights"),
    *("configuration_files", "num_labels", "text_config", "fusion_config", "per_layer_config", "auto_map"),
]
ROPE = ["rope_type", "rope_theta", "factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"]
ROPE += ["original_max_position_embeddings", "partial_rotary_factor", "attention_factor", "beta_fast"]
TREE = ["num_assistant_tokens", "tree_depth", "tree_top_k", "suffix_nodes", "compile"]
OTHER_SETTINGS = ["temperature", "max_new_tokens", "eos_token_id", "compile_config", "watermarking_config", "to_dict"]
OTHER_SETTINGS += ["cache_implementation", "num_beams", "stop_strings", "transformers_version", "unheard_of"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / PICKLE).exists():
        return torch.load(folder / PICKLE, weights_only=True)
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes weights in the format that the folder has; shards become one file."""
    if (folder / PICKLE).exists():
        torch.save(weights, folder / PICKLE)
        return
    for file in (*folder.glob("model-*"), *folder.glob("*.index.json")):
        file.unlink()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def weight_file(folder: Path) -> Path:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])[0]


# Fields.


def set_field(folder: Path, file: str, name: str, value: Any) -> str:
    path = folder / file
    fields = read(path) if path.exists() else {}
    fields[name] = value
    path.write_text(json.dumps(fields))
    shown = repr(value)[:30] if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return f"{file} {name}={shown}"


def size_field(folder: Path, rng: random.Random) -> str:
    return set_field(folder, CONFIG, rng.choice(SIZES), rng.choice(WRONG))


def name_field(folder: Path, rng: random.Random) -> str:
    return set_field(folder, CONFIG, rng.choice(NAMES), rng.choice([*WRONG_NAMES, *WRONG]))


def rope_field(folder: Path, rng: random.Random) -> str:
    rope: dict[str, Any] = {"rope_type": rng.choice(WRONG_NAMES), "rope_theta": 1e4, "factor": 2.0}
    for name in rng.sample(ROPE, 2):
        rope[name] = rng.choice([*WRONG, [1.0] * 16, ["x"] * 16])
    return set_field(folder, CONFIG, "rope_parameters", rope)


def tree_setting(folder: Path, rng: random.Random) -> str:
    return set_field(folder, SETTINGS, rng.choice(TREE), rng.choice([*WRONG, 400, 513]))


def other_setting(folder: Path, rng: random.Random) -> str:
    return set_field(folder, SETTINGS, rng.choice(OTHER_SETTINGS), rng.choice(WRONG))


def missing_field(folder: Path, rng: random.Random) -> str:
    fields = read(folder / CONFIG)
    name = rng.choice(sorted(fields))
    del fields[name]
    (folder / CONFIG).write_text(json.dumps(fields))
    return f"no {name}"


def other_value(folder: Path, rng: random.Random) -> str:
    """Doubles, halves or increases a size, so that it does not fit the weights."""
    fields = read(folder / CONFIG)
    name = rng.choice([name for name in SIZES if type(fields.get(name)) is int])
    fields[name] = rng.choice([2 * fields[name], fields[name] // 2, fields[name] + 1, 64, 65536])
    (folder / CONFIG).write_text(json.dumps(fields))
    return f"{name}={fields[name]}"


# Files.


def bad_json(folder: Path, rng: random.Random) -> str:
    path = rng.choice([path for path in folder.glob("*.json") if path.is_file()] or [folder / CONFIG])
    text = path.read_text() if path.exists() else "{}"
    kinds: dict[str, bytes] = {
        "a list": b"[1]",
        "a string": b'"x"',
        "null": b"null",
        "a number": b"5",
        "empty": b"",
        "cut": text[: rng.randrange(1, len(text))].encode(),
        "not UTF-8": b"\xff\xfe" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "nested": b'{"a":' * 20000 + b"1" + b"}" * 20000,
        "a nested list": b"[" * 100000,
        "a field twice": b'{"hidden_size": 1,' + text.strip()[1:].encode(),
        "a huge number": b'{"hidden_size": ' + b"9" * 5000 + b"}",
        "binary": rng.randbytes(200),
        "zeros": bytes(1000),
        "large": b'{"a": "' + b"x" * 2**25 + b'"}',
    }
    kind = rng.choice(sorted(kinds))
    path.write_bytes(kinds[kind])
    return f"{path.name} is {kind}"


def other_kind_of_file(folder: Path, rng: random.Random) -> str:
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    kind = rng.choice(["missing", "a folder", "a link to nothing", "a pipe", "a link out", "empty"])
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to("nowhere")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link out":
        outside = folder.parent / f"outside-{path.name}"
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif kind == "empty":
        path.touch()
    return f"{path.name} is {kind}"


def adapter_beside(folder: Path, rng: random.Random) -> str:
    fields = rng.choice([{}, {"base_model_name_or_path": "/etc"}, {"peft_type": "LORA"}, []])
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return "an adapter beside it"


# Weights.


def damaged_bytes(folder: Path, rng: random.Random) -> str:
    path = weight_file(folder)
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "cut early", "flipped header", "longer", "garbage", "long header", "zeros"])
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "cut early":
        data = data[: rng.randrange(1, 60)]
    elif kind == "flipped header":
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(min(800, len(data)))] ^= rng.randrange(1, 256)
    elif kind == "longer":
        data += rng.randbytes(100)
    elif kind == "garbage":
        data = bytearray(rng.randbytes(500))
    elif kind == "long header":
        data[:8] = (2 ** rng.choice([20, 40, 62])).to_bytes(8, "little")
    else:
        data = bytearray(1000)
    path.write_bytes(data)
    return f"{path.name}: {kind}"


def changed_weight(folder: Path, rng: random.Random) -> str:
    weights = weights_of(folder)
    name = rng.choice(sorted(weights))
    value = weights[name]
    kinds: dict[str, Any] = {
        "missing": None,
        "renamed": None,
        "integers": value.to(torch.int32),
        "bytes": value.to(torch.uint8),
        "booleans": value.bool(),
        "complex": value.to(torch.complex64),
        "float8": value.float().to(torch.float8_e4m3fn),
        "half": value.half(),
        "double": value.double(),
        "flat": value.flatten(),
        "transposed": value.t().contiguous() if value.ndim == 2 else value[None],
        "twice as long": torch.cat([value, value]),
        "without elements": value[:0],
        "one element": value.flatten()[0],
        "nan": value.double() * float("nan"),
        "inf": value.double() * float("inf"),
        "1e30": value.double() * 1e30,
    }
    kind = rng.choice(sorted(kinds))
    del weights[name]
    if kind == "renamed":
        weights[f"{name}.x"] = value
    elif kind != "missing":
        weights[name] = kinds[kind]
    write_weights(folder, weights)
    return f"{name}: {kind}"


def draft_vocabulary(folder: Path, rng: random.Random) -> str:
    weights = weights_of(folder)
    kinds: dict[str, Any] = {
        "negative": torch.tensor([-1, 5, 7, 9]),
        "repeated": torch.tensor([5, 5, 7, 9]),
        "unsorted": torch.tensor([9, 5, 7, 3]),
        "out of range": torch.tensor([5, 7, 9, 10**6]),
        "huge": torch.tensor([5, 7, 9, 2**62]),
        "floats": torch.tensor([5.0, 7.0, 9.0, 11.0]),
        "int32": torch.tensor([5, 7, 9, 11], dtype=torch.int32),
        "two dimensions": torch.tensor([[5, 7], [9, 11]]),
        "too long": torch.arange(9),
        "fine": torch.tensor([5, 7, 9, 11]),
        "missing": None,
        "empty": torch.tensor([], dtype=torch.long),
    }
    kind = rng.choice(sorted(kinds))
    weights.pop("draft_vocab", None)
    if kinds[kind] is not None:
        weights["draft_vocab"] = kinds[kind]
    write_weights(folder, weights)
    set_field(folder, CONFIG, "draft_vocab_size", 4 if kind != "empty" else 0)
    return f"draft_vocab: {kind}"


class RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled(folder: Path, rng: random.Random) -> str:
    """Replaces the weights by pickles of many kinds."""
    weights = weights_of(folder)
    bomb = RunsCode(folder / "executed")
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    path = folder / PICKLE
    kind = rng.choice(
        [
            *("code", "legacy code", "plain pickle", "list", "nested", "object", "compressed", "expanded", "sparse"),
            *("number", "meta", "named safetensors", "unnamed", "legacy", "views"),
        ]
    )
    contents: dict[str, Any] = {
        "code": {**weights, "x": bomb},
        "legacy code": {**weights, "x": bomb},
        "list": list(weights.values()),
        "nested": {"state_dict": weights},
        "object": {**weights, "x": {"a": 1}},
        "expanded": {**weights, "fc.weight": torch.zeros(1).expand(2**20, 2**20)},
        "sparse": {**weights, "fc.bias": weights["fc.bias"].to_sparse()},
        "number": 5,
        "meta": {name: value.to("meta") for name, value in weights.items()},
        "unnamed": dict(enumerate(weights.values())),
        "views": {**weights, "fc.bias": torch.zeros(len(weights["fc.bias"]) + 8)[8:]},
    }
    if kind in ("plain pickle", "named safetensors"):
        target = path if kind == "plain pickle" else folder / WEIGHTS
        target.write_bytes(pickle.dumps({**weights, "x": bomb}))
    else:
        torch.save(contents.get(kind, weights), path, _use_new_zipfile_serialization=not kind.startswith("legacy"))
    if kind == "compressed":
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    return f"pickle: {kind}"


def changed_index(folder: Path, rng: random.Random) -> str:
    path = folder / INDEX
    if not path.exists():
        only = weight_file(folder)
        only.rename(folder / "model-00001-of-00001.safetensors")
        path.write_text(json.dumps({"metadata": {}, "weight_map": {"fc.bias": "model-00001-of-00001.safetensors"}}))
    index = read(path)
    name = sorted(index["weight_map"])[0]
    shard = sorted(folder.glob("model-*"))[0]
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(shard.read_bytes())
    kind = rng.choice(
        ["../outside.safetensors", "/etc/passwd", str(outside), "a link", "missing.safetensors", "x", ""]
    )
    kind = rng.choice([kind, kind, "no map", "no metadata", "a list", "numbers", "lists", "empty"])
    if kind == "a link":
        shard.unlink()
        shard.symlink_to(outside)
    elif kind == "no map":
        del index["weight_map"]
    elif kind == "no metadata":
        del index["metadata"]
    elif kind == "a list":
        index["weight_map"] = list(index["weight_map"])
    elif kind in ("numbers", "lists"):
        index["weight_map"] = dict.fromkeys(index["weight_map"], 5 if kind == "numbers" else ["a"])
    elif kind == "empty":
        index["weight_map"] = {}
    else:
        index["weight_map"][name] = kind
    path.write_text(json.dumps(index))
    return f"index: {kind or 'an empty name'}"


DAMAGES: list[tuple[int, Damage]] = [  # with how often each is drawn
    (5, size_field),
    (3, name_field),
    (2, rope_field),
    (3, tree_setting),
    (1, other_setting),
    (1, missing_field),
    (2, other_value),
    (3, bad_json),
    (2, other_kind_of_file),
    (3, damaged_bytes),
    (4, changed_weight),
    (2, draft_vocabulary),
    (3, pickled),
    (2, changed_index),
    (1, adapter_beside),
]


def damage(folder: Path, rng: random.Random) -> str:
    """Damages a draft in one way, or now and then in two or three; says how."""
    weights, kinds = zip(*DAMAGES, strict=True)
    done: list[str] = []
    drawn = rng.choices(kinds, weights, k=rng.choice([1, 1, 1, 1, 2, 3]))
    for kind in sorted(drawn, key=lambda kind: kind is other_kind_of_file):  # last: reading a pipe would not end
        try:
            done.append(kind(folder, rng))
        except Exception:  # the first damage may leave nothing for the second
            if not done:
                raise
    return ", ".join(done)


__all__ = ["damage"]
