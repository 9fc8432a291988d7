"""A draft says which target it is for, without a path of the machine, and a call with another target warns once."""

import json
import logging

import pytest
import torch
from training_runs import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

import msd_hf
from msd_hf import MSDDraftConfig, MSDDraftModel, MSDError
from msd_hf.draft.checkpoints import read_config
from msd_hf.hub.fingerprint import head_signs, identify_target, sign_difference
from msd_hf.hub.names import is_hub_id, public_name, target_or_named
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_tokenOfSomebody0123456789"


def llama(seed=0, **sizes):
    config = LlamaConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **sizes,
        }
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "given, name, revision",
    [
        ("owner/model", "owner/model", COMMIT),
        (f"/home/me/.cache/huggingface/hub/models--owner--a.model/snapshots/{COMMIT}", "owner/a.model", COMMIT),
        (f"/home/me/hub/models--owner--a.model/snapshots/{COMMIT}/", "owner/a.model", COMMIT),
        ("/home/me/models/llava", "llava", None),
        ("~/llava", "llava", None),
        ("../models/llava", "llava", None),
        ("C:\\Users\\me\\llava", "llava", None),
        ("a/b/c", "c", None),
        ("gpt2", "gpt2", None),
        ("/", None, None),
        ("~", None, None),
        ("", None, None),
        (None, None, None),
        (5000 * "x", 200 * "x", None),  # no path is as long as that
        (f"/models/{TOKEN}", "<redacted>", None),
        (f"owner/{TOKEN}", "<redacted>", None),
    ],
)
def test_a_name_is_published_without_its_path(given, name, revision):
    assert public_name(given, COMMIT) == (name, revision)


def test_a_folder_of_two_names_is_no_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "ein Modell ü").mkdir(parents=True)
    assert public_name("owner/ein Modell ü") == ("ein Modell ü", None)
    assert public_name("owner") == ("owner", None) and public_name(".") == (tmp_path.name, None)
    assert not is_hub_id("owner/ein Modell ü") and not is_hub_id("a--b/..") and not is_hub_id(None)


def test_from_target_saves_what_identifies_the_target(tmp_path):
    target = llama()
    target.config._name_or_path = str(tmp_path / "secret" / "my-llama")
    MSDDraftModel.from_target(target).save_pretrained(tmp_path / "draft")
    text = (tmp_path / "draft" / "config.json").read_text()
    assert str(tmp_path) not in text and "secret" not in text
    saved = json.loads(text)
    assert saved["target_name_or_path"] == "my-llama" and "target_revision" not in saved
    fingerprint = saved["target_fingerprint"]
    assert (fingerprint["architecture"], fingerprint["hidden_size"], fingerprint["vocab_size"]) == (
        "LlamaForCausalLM",
        64,
        320,
    )
    draft = MSDDraftModel.from_pretrained(tmp_path / "draft")
    assert sign_difference(draft.config.target_fingerprint, target) == 0
    of_config = MSDDraftConfig.from_target(target.config)
    assert of_config.target_name_or_path == "my-llama" and "head" not in of_config.target_fingerprint
    target.config._name_or_path, target.config._commit_hash = "owner/llama", COMMIT
    assert identify_target(target)["target_revision"] == COMMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_the_same_head(dtype):
    saved = identify_target(llama())["target_fingerprint"]
    assert sign_difference(saved, llama().to(dtype)) <= 0.01


def test_a_padded_vocabulary_is_the_same_head_and_a_trained_one_is_between():
    target = llama(vocab_size=40000)
    saved = identify_target(target)["target_fingerprint"]
    target.resize_token_embeddings(40064, mean_resizing=False)
    assert sign_difference(saved, target) == 0
    with torch.no_grad():
        target.lm_head.weight += 0.2 * target.lm_head.weight.std() * torch.randn_like(target.lm_head.weight)
    assert 0.02 < sign_difference(saved, target) < 0.2
    assert 0.4 < sign_difference(saved, llama(seed=1, vocab_size=40000)) < 0.6


class Shard(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", ["meta", "int8", "shard", "rows of another process", "no weight"])
def test_a_head_that_cannot_be_read_has_no_signs(kind):
    target = llama()
    saved = identify_target(target)["target_fingerprint"]
    head = target.lm_head
    if kind == "meta":
        head.to("meta")
    elif kind == "int8":
        head.weight = torch.nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    elif kind == "shard":
        head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(Shard), requires_grad=False)
    elif kind == "rows of another process":
        head.weight = torch.nn.Parameter(head.weight.detach()[:160])
    else:
        del head.weight
    assert head_signs(target) is None and sign_difference(saved, target) is None
    assert identify_target(target)["target_fingerprint"]["hidden_size"] == 64


def test_tied_heads_have_signs():
    assert head_signs(llama(tie_word_embeddings=True)) is not None


def warnings_of(target, draft, caplog, calls=2):
    caplog.clear()
    ids = torch.arange(5)[None]
    expected = target.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(calls):
        out = target.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, assistant_model=draft)
        assert torch.equal(out, expected)
    return [record.getMessage() for record in caplog.records if "trained for" in record.getMessage()]


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("msd_hf"), "propagate", True)
    return caplog


def test_another_target_of_the_same_size_is_warned_of_once_a_pair(log):
    first, second = llama(), llama(seed=1)
    first.config._name_or_path, second.config._name_or_path = "owner/first", "/home/me/second"
    draft = MSDDraftModel.from_target(first)
    assert warnings_of(first, draft, log) == []
    (warning,) = warnings_of(second, draft, log)
    for text in ("'owner/first'", "'second'", "fine-tuned", "acceptance_lengths", "msd-hf bench"):
        assert text in warning
    assert "/home/me" not in warning and "\n" not in warning
    assert warnings_of(second, draft, log) == []
    assert len(warnings_of(second, MSDDraftModel.from_target(first), log)) == 1
    draft.config.target_fingerprint = None
    msd_hf.release(draft)
    assert warnings_of(second, draft, log) == []


@pytest.mark.parametrize("head", ["zz", "", 7, None, "00" * 400])
def test_an_edited_fingerprint_is_no_reason_to_fail(head, log):
    target = llama()
    draft = MSDDraftModel.from_target(target)
    draft.config.target_fingerprint = {"head": head}
    assert warnings_of(target, draft, log, calls=1) == []


def test_the_head_is_read_once_a_pair(monkeypatch):
    from msd_hf.hub import fingerprint

    reads = []
    original = fingerprint.head_signs
    monkeypatch.setattr(fingerprint, "head_signs", lambda target: reads.append(1) or original(target))
    target = llama()
    draft = MSDDraftModel.from_target(target)
    reads.clear()
    for _ in range(3):
        target.generate(torch.arange(5)[None], max_new_tokens=4, pad_token_id=0, assistant_model=draft)
    assert len(reads) == 1


def test_an_old_draft_is_saved_as_before(tmp_path):
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (DRAFT_DIR, tmp_path))
    assert "target_fingerprint" not in after and "target_name_or_path" not in after
    # Fields of options that came later say that the draft has none of them.
    assert after.pop("fc_bias") is True and after.pop("global_image_vector") is False
    added = after.keys() - before.keys()
    assert (
        added <= {"_how_to_load", "draft_vocab_size", "trained_visual_rows"}
        and "import msd_hf" in after["_how_to_load"]
    )
    again = MSDDraftModel.from_pretrained(tmp_path)
    assert again.config.target_fingerprint is None and not hasattr(again.config, "_how_to_load")


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_name_or_path", 7),
        ("target_name_or_path", "x" * 300),
        ("target_revision", []),
        ("target_fingerprint", "x"),
        ("target_fingerprint", {"head": "f" * 5000}),
        ("target_fingerprint", {"head": [1]}),
        ("target_fingerprint", {str(number): 1 for number in range(50)}),
    ],
)
def test_damaged_fields_are_refused_by_name(field, value, tmp_path):
    fields = json.loads((DRAFT_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(msd_hf.MSDCheckpointError, match=field):
        MSDDraftConfig.from_pretrained(tmp_path)


def test_the_trainer_saves_its_target(small_target, toy_processor, training_data, tmp_path):
    other = MSDDraftModel.from_target(small_target)
    other.config.target_name_or_path, other.config.target_fingerprint = "somebody/else", {"head": "00"}
    small_target.config._name_or_path = str(tmp_path / "models" / "small-llava")
    trainer = make_trainer(small_target, toy_processor, training_data, tmp_path / "run", model=other)
    trainer.save_model()
    text = (tmp_path / "run" / "config.json").read_text()
    config = json.loads(text)
    assert str(tmp_path) not in text and config["target_name_or_path"] == "small-llava"
    assert sign_difference(config["target_fingerprint"], small_target) == 0
    assert trainer.provenance()["target"] == "small-llava"


@pytest.mark.parametrize(
    "name, original_name, expected",
    [
        ("lucylyn/MSD-LLaVA1.5-7B", None, "llava-hf/llava-1.5-7b-hf"),
        ("checkpoint", "liuhaotian/llava-v1.5-13b", "llava-hf/llava-1.5-13b-hf"),
        ("checkpoint", "/home/author/llava", None),
        ("checkpoint", ["x"], None),
    ],
)
def test_original_drafts_get_the_target_of_the_table(name, original_name, expected, tmp_path, monkeypatch):
    fields = {"model_type": "llava", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96}
    fields |= {"num_attention_heads": 4, "num_hidden_layers": 1, "_name_or_path": original_name}
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    given = name
    if "/" in name:  # as it lies in the Hub's cache
        snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        given = snapshot
    config, is_original, _ = read_config(given, MSDDraftConfig, {})
    assert is_original and config.target_name_or_path == expected


def test_a_target_is_asked_for_where_the_draft_names_none():
    config = MSDDraftConfig(target_name_or_path="owner/model")
    assert target_or_named(None, config) == "owner/model" and target_or_named("mine", config) == "mine"
    for name, message in (("folder", "only names a folder, 'folder'"), (None, "does not name its target")):
        with pytest.raises(MSDError, match=message):
            target_or_named(None, MSDDraftConfig(target_name_or_path=name))


def test_generate_and_bench_without_a_target(run, tmp_path, monkeypatch):
    """A folder `someone/toy` stands for the repository of this name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "toy").symlink_to(TARGET_DIR)
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.config.target_name_or_path = "someone/toy"
    draft.save_pretrained(tmp_path / "draft")
    question = ("--image", DEMO_IMAGE, "--prompt", "What is there?", "--max-new-tokens", 8)
    code, out, err = run("generate", "--draft", tmp_path / "draft", *question)
    assert code == 0 and "someone/toy, which the draft names" in out and "identical  yes" in out, err
    code, _, err = run("generate", "--draft", DRAFT_DIR, *question)
    assert code == 1 and err.splitlines()[-1].startswith("Error: --target is missing")
    code, _, err = run("bench", "--draft", DRAFT_DIR, "--data", tmp_path / "none.json")
    assert code == 1 and "--target is missing" in err
