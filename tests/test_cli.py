"""The commands run in this process with the arguments that a user types."""

import json

import golden_sets
import pytest
from PIL import Image
from safetensors.torch import load_file

from msd_hf import MSDDraftConfig, MSDDraftModel, loading
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


def test_demo_answers_marks_accepted_tokens_and_compares(run):
    code, out, err = run("demo", "--repeats", 1, "--max-new-tokens", 40)
    assert code == 0, err
    assert "‹" in out and "›" in out  # marks around accepted draft tokens on a terminal without colours
    for row in ("target alone", "with the draft", "tokens/s", "speedup", "tau"):
        assert row in out
    assert "identical  yes" in out


def test_generate_with_a_picture_and_without(run, tmp_path):
    Image.open(DEMO_IMAGE).save(tmp_path / "picture.png")
    pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR, "--max-new-tokens", 12)
    code, out, err = run("generate", *pair, "--image", tmp_path / "picture.png", "--prompt", "What is there?")
    assert code == 0 and "identical  yes" in out, err
    code, out, err = run(
        "generate", *pair, "--text-only", "--prompt", "Count.", "--temperature", 0.7, "--seed", 3, "--dtype", "float64"
    )
    assert code == 0 and "identical  yes" in out, err


def write_draft(folder, **overrides):
    config = MSDDraftConfig.from_pretrained(DRAFT_DIR)
    fields = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": config.vocab_size}
    MSDDraftModel(MSDDraftConfig(**{**fields, **overrides})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "case, message",
    [
        ("missing image", "There is no image file"),
        ("text as image", "is not an image that Pillow can read"),
        ("truncated image", "is damaged"),
        ("neither image nor text-only", "--image, or ask without one with --text-only"),
        ("hidden size", "hidden size 64 does not match the target's 128"),
        ("decoder kind", "made for a decoder of kind 'qwen2'"),
        ("target kind", "made for a target of kind 'qwen2_vl'"),
        ("target as draft", "is not a draft of the original MSD repository"),
        ("no such draft", "no-such-draft"),
        ("dtype", "--dtype 'float3' is not known"),
        ("device", "--device 'toaster' cannot be used"),
    ],
)
def test_bad_input_gives_one_line_and_a_non_zero_exit(case, message, run, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", refuse)
    options = {"--target": TARGET_DIR, "--draft": DRAFT_DIR, "--image": DEMO_IMAGE, "--prompt": "What is there?"}
    if case == "missing image":
        options["--image"] = tmp_path / "none.png"
    elif case == "text as image":
        options["--image"] = tmp_path / "note.png"
        options["--image"].write_text("not a picture")
    elif case == "truncated image":
        options["--image"] = tmp_path / "half.png"
        content = DEMO_IMAGE.read_bytes()
        options["--image"].write_bytes(content[: len(content) // 2])
    elif case == "neither image nor text-only":
        del options["--image"]
    elif case == "hidden size":
        options["--draft"] = write_draft(tmp_path / "draft", hidden_size=64)
    elif case == "decoder kind":
        options["--draft"] = write_draft(tmp_path / "draft", target_text_model_type="qwen2")
    elif case == "target kind":
        options["--draft"] = write_draft(tmp_path / "draft", target_model_type="qwen2_vl")
    elif case == "target as draft":
        options["--draft"] = TARGET_DIR
    elif case == "no such draft":
        options["--draft"] = tmp_path / "no-such-draft"
    elif case == "dtype":
        options["--dtype"] = "float3"
    elif case == "device":
        options["--device"] = "toaster"
    code, _, err = run("generate", *(part for option in options.items() for part in option))
    assert code == 1
    assert err.startswith("Error: ") and err.count("\n") == 1 and message in err


def test_convert_writes_our_format(run, tmp_path):
    source = golden_sets.write_original_checkpoint("draft_weights_llava", tmp_path / "original", "llava")
    code, _, err = run("convert", source, tmp_path / "ours")
    assert code == 0, err
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "msd_draft"
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    original, _ = golden_sets.load("draft_weights_llava")
    assert set(original) - set(weights) == {"embed_tokens.weight"}
    assert all((weights[name] == original[name]).all() for name in weights)

    code, _, err = run("convert", source, tmp_path / "ours")
    assert code == 1 and "--overwrite" in err
    assert run("convert", source, tmp_path / "ours", "--overwrite")[0] == 0
    code, _, err = run("convert", tmp_path / "nothing", tmp_path / "new")
    assert code == 1 and not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "ours"]  # no folder is left half-written
