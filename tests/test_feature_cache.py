"""Features of the bundled toy target are written to disk and read back."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDDataError, MSDError
from msd_hf.prompts import move_inputs
from msd_hf.target.adapter import TargetAdapter
from msd_hf.toy import TARGET_DIR, write_dataset
from msd_hf.training.data.conversations import load_conversations
from msd_hf.training.data.encoding import ConversationEncoder, collate_conversations
from msd_hf.training.features import index as feature_index
from msd_hf.training.features import storage as feature_storage
from msd_hf.training.features.cache import FeatureCache, collate_features, estimate_disk, extract_features
from msd_hf.training.features.fingerprint import target_fingerprint
from msd_hf.training.rows import draft_rows, trained_rows


NUM_SAMPLES = 22
SETTINGS = {"batch_size": 2, "samples_per_shard": 5}  # the last window, shard and batch are not full


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    """The toy target, cut down to its first three layers."""
    config = AutoConfig.from_pretrained(TARGET_DIR)
    config.text_config.num_hidden_layers = 3
    target = AutoModelForImageTextToText.from_pretrained(TARGET_DIR, config=config)
    target.save_pretrained(folder := tmp_path_factory.mktemp("target"))
    return folder


@pytest.fixture(scope="module")
def load_target(target_folder):
    def load(folder=target_folder, dtype=torch.float32):
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    return load


@pytest.fixture(scope="module")
def target(load_target):
    return load_target()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TARGET_DIR)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "train", NUM_SAMPLES, seed=0)


@pytest.fixture(scope="module")
def conversations(data):
    return load_conversations(data)


@pytest.fixture(scope="module")
def encoded(processor, conversations):
    encoder = ConversationEncoder(processor)
    return [encoder(conversations[number]) for number in range(NUM_SAMPLES)]


@pytest.fixture(scope="module")
def whole(target, processor, conversations, tmp_path_factory):
    """A cache that one run has made without interruption."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    extract_features(target, processor, conversations, folder, **SETTINGS)
    return folder


@pytest.fixture
def cache_folder(whole, tmp_path):
    """A copy of the whole cache, which a test may damage."""
    return shutil.copytree(whole, tmp_path / "cache")


@pytest.fixture
def refuse_to_run(target):
    """Fails a test that runs the target."""

    def refuse(*args):
        raise AssertionError("the target was run")

    handle = target.get_decoder().register_forward_pre_hook(refuse)
    yield
    handle.remove()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_alone(target, sample, **adapter_arguments):
    """The target's features of one sample, without padding."""
    inputs = collate_conversations([sample], 0)
    inputs.pop("assistant_mask")
    return TargetAdapter(target, **adapter_arguments).features(**inputs)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("all_hidden_states", [False, True])
def test_reading_gives_what_the_target_computes(
    storage, all_hidden_states, target, processor, conversations, encoded, tmp_path
):
    extract_features(
        target, processor, conversations, tmp_path / "cache", storage=storage, all_hidden_states=all_hidden_states,
        **{**SETTINGS, "batch_size": 1},
    )  # fmt: skip
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache) == NUM_SAMPLES and cache.ids == [conversations[number].id for number in range(NUM_SAMPLES)]

    def assert_stored(got, expected):
        if storage == "int8":
            assert got.dtype == torch.float32
            step = expected.abs().amax(-1, keepdim=True) / 127
            assert ((got - expected).abs() <= step * 0.501).all()
        else:
            assert torch.equal(got, expected.to(getattr(torch, storage)))

    num_images = num_left_out = 0
    for sample, inputs in zip(cache, encoded, strict=True):
        features = run_alone(target, inputs)
        visual_mask = features.visual_mask[0]
        for name in ("input_ids", "assistant_mask"):
            assert torch.equal(sample[name], inputs[name]) and sample[name].dtype == inputs[name].dtype
        assert torch.equal(sample["visual_mask"], visual_mask)
        assert_stored(sample["visual_embeds"], features.inputs_embeds[0][visual_mask])
        left_out = (sample["hidden_states"] == 0).all(-1)
        assert_stored(sample["hidden_states"][~left_out], features.hidden_states[0][~left_out])
        num_images += int(visual_mask.any())
        num_left_out += int(left_out.sum())
        if all_hidden_states:
            assert not left_out.any()
        else:  # the position before an image, and all positions of the image except the last
            assert left_out.sum() == visual_mask.sum()
    assert num_images > 3 and len(cache) - num_images > 3
    assert all_hidden_states or num_left_out == 36 * num_images


@pytest.mark.parametrize("choice", ["answer", "drafted"])
@pytest.mark.parametrize("kind", ["plain", "feature layers", "not decoupled"])
def test_a_draft_learns_the_same_from_the_cache(
    choice, kind, load_target, processor, conversations, encoded, tmp_path
):
    layers = [0, 2] if kind == "feature layers" else None
    fuses_all = kind == "not decoupled"
    target = load_target(dtype=torch.float64)  # a draft with random weights magnifies rounding errors
    extract_features(
        target, processor, conversations, tmp_path / "cache", feature_layers=layers, all_hidden_states=fuses_all,
        **SETTINGS,
    )  # fmt: skip
    cache = FeatureCache(tmp_path / "cache")
    cache.check(target, processor, 2048, layers, needs_all_hidden_states=fuses_all)
    adapter = TargetAdapter(target, feature_layers=layers)
    draft = MSDDraftModel.from_target(target, decouple_visual_tokens=not fuses_all, target_layers=layers)
    numbers = [0, 3, 6, 7]
    cached = collate_features([cache[number] for number in numbers], pad_token_id=0)
    online = collate_conversations([encoded[number] for number in numbers], 0)
    for name in ("input_ids", "attention_mask", "assistant_mask"):
        assert torch.equal(cached[name], online[name]) and cached[name].dtype == online[name].dtype
    assistant_mask = online.pop("assistant_mask")
    features = adapter.features(**move_inputs(online, target))
    embeds = adapter.embed(cached["input_ids"]).detach()
    embeds = embeds.masked_scatter(cached["visual_mask"].unsqueeze(-1), cached["visual_embeds"])
    trained = trained_rows(assistant_mask, online["attention_mask"], choice)
    results = []
    for batch in (
        (embeds, cached["hidden_states"], cached["visual_mask"]),
        (features.inputs_embeds, features.hidden_states, features.visual_mask),
    ):
        rows = draft_rows(*batch, trained, adapter.reads)
        layer_states, last = adapter.reads.split(rows.hidden_states)
        states = draft(rows.inputs_embeds, last, rows.visual_mask, layer_states=layer_states).last_hidden_state
        results.append((states[trained], rows.goals[trained]))
    assert features.visual_mask.any() and trained.sum() > 50
    torch.testing.assert_close(results[0], results[1], atol=1e-8, rtol=1e-8)


def test_running_again_does_nothing(target, processor, conversations, cache_folder, refuse_to_run):
    before = {path.name: path.stat().st_mtime_ns for path in cache_folder.iterdir()}
    report = extract_features(target, processor, conversations, cache_folder, **SETTINGS)
    assert report.num_samples == NUM_SAMPLES and report.skipped == {} and report.estimate is None
    assert report.num_bytes == sum(path.stat().st_size for path in cache_folder.glob("shard-*"))
    assert before == {path.name: path.stat().st_mtime_ns for path in cache_folder.iterdir()}


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    target, target_folder, processor, conversations, data, whole, tmp_path
):
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from msd_hf.training.features import storage as feature_storage
        from msd_hf.training.data.conversations import load_conversations
        from msd_hf.training.features.cache import extract_features

        save_file, calls = feature_storage.save_file, []

        def die_in_the_third(tensors, path, **kwargs):
            save_file(tensors, path, **kwargs)
            calls.append(path)
            if len(calls) == 3:
                os.truncate(path, Path(path).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        feature_storage.save_file = die_in_the_third
        target = AutoModelForImageTextToText.from_pretrained({str(target_folder)!r})
        processor = AutoProcessor.from_pretrained({str(TARGET_DIR)!r})
        extract_features(target, processor, load_conversations({str(data)!r}), sys.argv[1], **{SETTINGS!r})
    """
    folder = tmp_path / "cache"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    half = contents(folder)
    (folder / ".tmpqhJ7Py").write_bytes(b"what safetensors leaves when it is killed")
    assert len(half) == 4 and any(name.endswith(".tmp") for name in half)
    with pytest.raises(MSDError, match=r"not complete: 2 of 5 shards"):
        FeatureCache(folder)

    seen = []
    handle = target.get_decoder().register_forward_pre_hook(lambda *args: seen.append(1))
    extract_features(target, processor, conversations, folder, **SETTINGS)
    handle.remove()
    assert len(seen) == 3 + 3 + 1  # batches of the three shards that were missing
    assert contents(folder) == contents(whole)


def test_an_interrupt_between_shard_and_index_loses_that_shard_only(
    target, processor, conversations, whole, tmp_path, monkeypatch
):
    write_shard, numbers = feature_index.write_shard, []

    def interrupt_after_the_second(path, samples):
        write_shard(path, samples)
        numbers.append(path.name)
        if len(numbers) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(feature_index, "write_shard", interrupt_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        extract_features(target, processor, conversations, tmp_path / "cache", **SETTINGS)
    extract_features(target, processor, conversations, tmp_path / "cache", num_workers=1, **SETTINGS)
    assert numbers[1:3] == ["shard-00001.safetensors"] * 2 and len(numbers) == 6
    assert contents(tmp_path / "cache") == contents(whole)


class OtherData:
    def __init__(self, conversations):
        self.conversations = conversations
        self.fingerprint = "0" * 64

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.conversations[index]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": "weights"}, "another target"),
        ({"target": "dtype"}, "`target_dtype` 'float32' instead of 'bfloat16'"),
        ({"processor": "template"}, "another processor"),
        ({"conversations": "other"}, "other conversations"),
        ({"max_length": 100}, "`max_length` 2048 instead of 100"),
        ({"storage": "int8"}, "`storage` 'float32' instead of 'int8'"),
        ({"feature_layers": [1]}, r"`feature_layers` \[\] instead of \[1\]"),
        ({"all_hidden_states": True}, "`all_hidden_states` False instead of True"),
        ({"samples_per_shard": 6}, "`samples_per_shard` 5 instead of 6"),
        ({"max_length": 100, "storage": "int8"}, "`max_length` 2048 instead of 100, `storage` 'float32'"),
    ],
)
def test_a_cache_made_in_another_way_is_refused(
    change, message, load_target, target, processor, conversations, cache_folder
):
    arguments = {"target": target, "processor": processor, "conversations": conversations, **SETTINGS, **change}
    if change.get("target") == "weights":
        arguments["target"] = load_target()
        with torch.no_grad():
            arguments["target"].get_decoder().norm.weight[-1] += 1e-3
    elif change.get("target") == "dtype":
        arguments["target"] = load_target(dtype=torch.bfloat16)
        arguments["storage"] = "float32"
    if "processor" in change:
        arguments["processor"] = AutoProcessor.from_pretrained(TARGET_DIR)
        arguments["processor"].chat_template += "{{- '' -}}"
    if "conversations" in change:
        arguments["conversations"] = OtherData(conversations)
    before = contents(cache_folder)
    with pytest.raises(MSDError, match=message) as error:
        extract_features(folder=cache_folder, **arguments)
    assert str(cache_folder) in str(error.value) and "\n" not in str(error.value)
    assert ("another processor" in str(error.value)) == ("processor" in change)
    assert contents(cache_folder) == before


def test_training_refuses_a_cache_of_another_target_processor_or_length(load_target, target, processor, whole):
    cache = FeatureCache(whole)
    cache.check(target, processor, 2048)
    cache.check(target, processor, 2048, feature_layers=[], needs_all_hidden_states=False)
    other = load_target()
    other.config.text_config.rms_norm_eps = 1e-3
    with pytest.raises(MSDError, match="another target"):
        cache.check(other, processor, 2048)
    for arguments, message in (
        ({"max_length": 512}, "`max_length` 2048 instead of 512"),
        ({"max_length": 2048, "feature_layers": [2]}, r"`feature_layers` \[\] instead of \[2\]"),
        ({"max_length": 2048, "needs_all_hidden_states": True}, "`all_hidden_states` False instead of True"),
    ):
        with pytest.raises(MSDError, match=message):
            cache.check(target, processor, **arguments)


@pytest.mark.parametrize("damage", ["truncated", "missing", "overwritten"])
def test_a_damaged_shard_is_noticed_and_written_again(damage, target, processor, conversations, whole, cache_folder):
    path = cache_folder / "shard-00002.safetensors"
    size = path.stat().st_size
    if damage == "truncated":
        os.truncate(path, size - 7)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\0" * size)
    with pytest.raises(MSDError, match=r"shard-00002\.safetensors of the feature cache .* is damaged") as error:
        list(FeatureCache(cache_folder))
    assert str(cache_folder) in str(error.value)
    if damage == "overwritten":
        path.unlink()
    extract_features(target, processor, conversations, cache_folder, **SETTINGS)
    assert contents(cache_folder) == contents(whole)


def test_broken_samples_are_counted_or_raised(target, processor, data, tmp_path):
    samples = json.loads(data.read_text())[:8]
    pictures = [number for number, sample in enumerate(samples) if "image" in sample]
    samples[pictures[0]]["image"] = "images/none.png"
    samples[1]["conversations"] = samples[1]["conversations"][:1]
    conversations = load_conversations(samples, image_folder=data.parent)
    report = extract_features(target, processor, conversations, tmp_path / "cache", samples_per_shard=3)
    assert pictures[0] != 1
    assert report.skipped == {"missing image": 1, "no assistant turn": 1} and report.num_samples == 6
    kept = [sample["id"] for number, sample in enumerate(samples) if number not in (1, pictures[0])]
    cache = FeatureCache(tmp_path / "cache")
    assert cache.ids == kept and len(list(cache)) == 6
    shards = json.loads((tmp_path / "cache" / "index.json").read_text())["shards"]
    missing = [name for shard in shards for name in shard["skipped"].get("missing image", [])]
    assert missing == [samples[pictures[0]]["id"]]

    with pytest.raises(MSDDataError):
        extract_features(target, processor, conversations, tmp_path / "strict", strict=True)
    with pytest.raises(MSDError, match=r"An earlier run, without `strict`, skipped .* missing image 1"):
        extract_features(target, processor, conversations, tmp_path / "cache", samples_per_shard=3, strict=True)
    # A shard without a usable sample writes no file and takes no index of the cache.
    whole = [sample for sample in samples if sample["id"] in kept]
    lonely = load_conversations([*whole[:2], samples[1], samples[1], whole[2]], image_folder=data.parent)
    extract_features(target, processor, lonely, tmp_path / "lonely", samples_per_shard=2, storage="int8")
    cache = FeatureCache(tmp_path / "lonely")
    assert len(cache) == 3 and torch.equal(cache[-1]["input_ids"], cache[2]["input_ids"])
    with pytest.raises(IndexError):
        cache[3]
    with pytest.raises(MSDError, match=r"None of 2 samples can be used \(no assistant turn 2\)"):
        useless = load_conversations([samples[1]] * 2)
        extract_features(target, processor, useless, tmp_path / "useless")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_the_disk_need_is_estimated_and_checked_first(
    storage, target, processor, conversations, tmp_path, monkeypatch
):
    arguments = {"storage": storage, "feature_layers": [0, 2]}
    estimate = estimate_disk(target, processor, conversations, **arguments)
    report = extract_features(target, processor, conversations, tmp_path / "fits", **arguments)
    assert report.estimate == estimate and estimate.storage == storage
    assert (report.num_samples, report.num_tokens) == (estimate.num_samples, estimate.num_tokens)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "fits").glob("*.safetensors"))
    assert abs(on_disk - estimate.num_bytes) < 0.01 * on_disk
    assert storage in str(estimate) and "22 samples" in str(estimate)

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, estimate.num_bytes - 1))
    monkeypatch.setattr(TargetAdapter, "features", None)
    with pytest.raises(MSDError, match=r"need about [\d.]+ MB, but the disk of .* has [\d.]+ MB left"):
        extract_features(target, processor, conversations, tmp_path / "not" / "fits", **arguments)
    assert not (tmp_path / "not").exists()


def test_incomplete_caches_and_other_folders_are_refused(target, processor, conversations, tmp_path):
    with pytest.raises(MSDError, match="no feature cache"):
        FeatureCache(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmpmine").write_text("no name that safetensors gives")
    with pytest.raises(MSDError, match="not empty"):
        extract_features(target, processor, conversations, tmp_path)
    assert (tmp_path / ".tmpmine").is_file()
    (tmp_path / ".tmpmine").unlink()
    with pytest.raises(MSDError, match="is a file"):
        extract_features(target, processor, conversations, tmp_path / "notes.txt")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(MSDError, match="damaged"):
        FeatureCache(tmp_path)
    (tmp_path / "index.json").write_text('{"format_version": 999}')
    with pytest.raises(MSDError, match="format version 999"):
        FeatureCache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "notes.txt"]
    with pytest.raises(MSDError, match="`storage` 'int4' is not known"):
        extract_features(target, processor, conversations, tmp_path / "new", storage="int4")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read_the_same(method, whole):
    cache = FeatureCache(whole)
    expected = [cache[number] for number in range(len(cache))]
    loader = DataLoader(cache, batch_size=None, num_workers=1, multiprocessing_context=method)
    for sample, other in zip(expected, loader, strict=True):
        assert all(torch.equal(sample[name], other[name]) for name in sample)
    assert len(pickle.dumps(cache)) < 10_000


def test_features_that_overflow_or_are_not_finite_are_refused(load_target, processor, conversations, tmp_path):
    target = load_target()
    with torch.no_grad():
        target.get_decoder().norm.weight.mul_(1e6)
    with pytest.raises(MSDError, match=r'which float16 cannot hold\. Extract .* `storage="bfloat16"`'):
        extract_features(target, processor, conversations, tmp_path / "half", storage="float16")
    with torch.no_grad():
        target.get_decoder().norm.weight.mul_(torch.inf)
    with pytest.raises(MSDError, match=r"None of 22 samples can be used \(non-finite features 22\)"):
        extract_features(target, processor, conversations, tmp_path / "infinite")


def test_the_fingerprint_depends_on_the_weights_and_not_on_the_folder(load_target, tmp_path):
    target = load_target(dtype=torch.bfloat16)
    target.save_pretrained(tmp_path / "elsewhere")
    fingerprint = target_fingerprint(target)
    target.to(torch.float32)
    assert target_fingerprint(target) == fingerprint  # float32 holds the same values
    copy = load_target(tmp_path / "elsewhere")
    assert target_fingerprint(copy) == fingerprint
    for name, parameter in copy.named_parameters():
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "layers.1.mlp.up_proj.weight")):
            with torch.no_grad():
                parameter.view(-1)[-3] += 1
            assert target_fingerprint(copy) != fingerprint, name
            with torch.no_grad():
                parameter.view(-1)[-3] -= 1
    with torch.no_grad():
        copy.lm_head.weight[300, 5] += 1  # one weight in the middle: head and embedding are read completely
    assert target_fingerprint(copy) != fingerprint


def test_hidden_states_are_kept_before_text_and_at_goals():
    #              bos  img img img text ans ans eos img img  text
    visual = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
    answer = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    # Position 8 stands before an image, but the row at the end of the answer predicts it, so it is kept. The last
    # position has no successor, so it is not.
    expected = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    assert torch.equal(feature_storage.stored_rows(answer, visual, False), expected)
    assert feature_storage.stored_rows(answer, visual, True).all()


def test_int8_keeps_rows_of_different_size_apart():
    rows = torch.tensor([[1.0, -0.5, 200.0, 100.0], [0.0, 0.0, 1e-9, -1e-9]])
    packed = feature_storage.pack("hidden_states", rows, hidden_size=2, storage="int8")
    assert packed["hidden_scales"].shape == (2, 2)
    values = packed["hidden_states"].view(2, 2, 2) * packed["hidden_scales"].unsqueeze(-1)
    torch.testing.assert_close(values.flatten(1), rows, rtol=0.008, atol=0)
