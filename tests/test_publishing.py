"""`msd-hf publish` and `draft.push_to_hub` upload a draft with the Hub's own client, and another process loads it."""

import json
import shutil
from pathlib import Path

import pytest
from hub_server import HubHandler, hub_in_process, metadata_errors, run_with_hub, serve_hub
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file

from msd_hf import MSDDraftModel, MSDError
from msd_hf.hub.card import MARK, write_card
from msd_hf.hub.publishing import collect_files, publish_folder
from msd_hf.toy import DRAFT_DIR


TOKEN = "hf_tokenOfSomebody0123456789"
API_KEY = "key-in-the-environment"
PUBLISHED = {"README.md", "config.json", "generation_config.json", "model.safetensors", "training_provenance.json"}


@pytest.fixture
def folder(tmp_path):
    """A draft as a training run leaves it, with much beside it that is nobody's business."""
    folder = tmp_path / "somebodys machine" / "mein Entwurf ü"
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.config.target_name_or_path = "someone/toy-llava"
    draft.save_pretrained(folder)
    shutil.copy(DRAFT_DIR / "training_provenance.json", folder)
    for name in ("training_args.bin", "notes.txt", ".env", "checkpoint-1/model.safetensors", "_answers/text.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{TOKEN} {folder}")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKER_API_KEY", API_KEY)
    root = tmp_path / "hub"
    root.mkdir()
    with hub_in_process(root, monkeypatch, TOKEN) as handler:
        yield handler


def uploaded(hub, name="me/draft"):
    return {path.name: path.read_bytes() for path in (hub.root / name).iterdir()}


def leaks(hub, folder):
    """Secrets and paths in all that was uploaded."""
    texts = (TOKEN, API_KEY, str(folder), str(folder.parent), str(Path.home()) + "/")
    content = b"\n".join([*hub.bodies, *(path.read_bytes() for path in hub.root.rglob("*") if path.is_file())])
    return [text for text in texts if text.encode() in content]


def test_publish_uploads_the_draft_alone_and_another_user_loads_it(folder, hub, run, tmp_path):
    code, out, err = run("publish", folder, "me/draft", "--private", "--license", "mit", "--language", "en")
    assert code == 0 and "The draft is at" in out, err
    assert "CREATE me/draft private" in hub.requests
    files = uploaded(hub)
    assert files.keys() == PUBLISHED and leaks(hub, folder) == []
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not (folder / "README.md").exists()  # nothing of the user's folder is changed
    card = ModelCard(files["README.md"].decode())
    assert metadata_errors(card) == []
    assert card.data.license == "mit" and '"me/draft"' in card.text

    shutil.copytree(hub.root / "me", tmp_path / "others" / "me")
    load = """
from msd_hf import MSDDraftModel
draft = MSDDraftModel.from_pretrained("me/draft")
print(draft.config.target_name_or_path, draft.generation_config.num_assistant_tokens, draft.fc.weight.sum().item())
try:
    from transformers import AutoModel
    import msd_hf; msd_hf.unregister()
    AutoModel.from_pretrained("me/draft")
except ValueError as error:
    print("msd_draft" in str(error))
"""
    with serve_hub(tmp_path / "others") as (endpoint, _):
        result = run_with_hub(load, endpoint, tmp_path / "home of another user")
    first, second = result.stdout.splitlines()
    weight = MSDDraftModel.from_pretrained(folder).fc.weight.sum().item()
    assert first.split() == ["someone/toy-llava", "auto", str(weight)] and second == "True"


def test_nothing_that_is_planted_is_uploaded(folder, hub):
    """Tokens and paths in the configuration, the settings, the record of the training and each argument."""
    planted = f"{TOKEN} {folder}"
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(folder), "target_name_or_path": str(folder), "target_revision": TOKEN}
    config["target_fingerprint"] = {"architecture": planted}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "note": planted}))
    record = json.loads((folder / "training_provenance.json").read_text())
    record |= {"command": f"msd-hf train --hub-token {TOKEN} --target {folder} {API_KEY}", "target": str(folder)}
    record["recipe"] = planted
    record["arguments"] |= {"hub_token": TOKEN, "run_name": planted, "password": "correct horse"}
    (folder / "training_provenance.json").write_text(json.dumps(record))
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.config._name_or_path = str(folder)
    draft.config.target_name_or_path = str(folder)
    message = {"commit_message": planted, "commit_description": planted}
    draft.push_to_hub("me/pushed", token=TOKEN, **message)
    MSDDraftModel.from_pretrained(DRAFT_DIR).push_to_hub("me/draft", token=TOKEN, private=True, **message)
    HfApi().create_repo("me/folder")
    publish_folder(folder, "me/folder", token=TOKEN, **message)
    assert leaks(hub, folder) == [] and b"correct horse" not in b"".join(hub.bodies)
    for name in ("me/pushed", "me/draft", "me/folder"):
        assert PUBLISHED - {"training_provenance.json"} <= uploaded(hub, name).keys()
    assert json.loads(uploaded(hub, "me/folder")["training_provenance.json"])["target"] == folder.name
    for name in ("license", "language", "tags"):
        value = [TOKEN] if name == "tags" else TOKEN
        with pytest.raises(MSDError, match="looks like a secret"):
            draft.push_to_hub("me/refused", **{name: value})
    assert not (hub.root / "me" / "refused").exists()


@pytest.mark.parametrize("case", ["card", "path in card", "licence", "weights"])
def test_words_of_the_user_with_a_secret_are_refused_before_anything_is_sent(case, folder, hub, run):
    if case == "card":
        (folder / "README.md").write_text(f"# Mine\n\nUse {TOKEN}.\n")
    elif case == "path in card":
        (folder / "README.md").write_text(f"# Mine\n\nIt was at {folder.parent}/data.\n")
    elif case == "licence":
        (folder / "LICENSE").write_text(f"Ask {API_KEY}")
    else:
        weights = load_file(folder / "model.safetensors")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "made by": TOKEN})
    code, _, err = run("publish", folder, "me/draft")
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("Error: Line ") and TOKEN not in line and API_KEY not in line
    assert hub.requests == [] and leaks(hub, folder) == []


def test_a_written_card_goes_up_as_it_is_and_stays_there(folder, hub):
    words = "---\nlicense: other\n---\nMy own words, with a/relative/path and https://huggingface.co/me.\n"
    (folder / "README.md").write_text(words)
    MSDDraftModel.from_pretrained(folder).push_to_hub("me/draft")
    assert uploaded(hub)["README.md"].decode() == words
    (folder / "README.md").unlink()
    MSDDraftModel.from_pretrained(folder).push_to_hub("me/draft")
    assert uploaded(hub)["README.md"].decode() == words  # the repository has a card that somebody has written
    write_card(folder, license="mit")
    MSDDraftModel.from_pretrained(folder).push_to_hub("me/new", license="apache-2.0", tags=["mine"])
    card = ModelCard(uploaded(hub, "me/new")["README.md"].decode())
    assert card.data.license == "apache-2.0" and "mine" in card.data.tags and MARK in card.text


@pytest.mark.parametrize(
    "case, message",
    [
        ("no folder", "does not hold a draft"),
        ("target", "does not hold a draft"),
        ("no weights", "model.safetensors"),
        ("cut weights", "model.safetensors"),
        ("bad name", "is no name of a repository"),
        ("odd settings", "generation_config.json"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_sent(case, message, folder, hub, run):
    repo = "a b/c" if case == "bad name" else "me/draft"
    if case == "no folder":
        folder = folder / "none"
    elif case == "target":
        folder = DRAFT_DIR.parent / "target"
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "cut weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif case == "odd settings":
        (folder / "generation_config.json").write_text("[")
    code, _, err = run("publish", folder, repo)
    assert code == 1 and err.splitlines()[-1].startswith("Error: ") and message in err.splitlines()[-1]
    assert hub.requests == []


def test_a_hub_that_refuses_or_is_away_gives_one_line(folder, hub, run, monkeypatch):
    monkeypatch.setattr(HubHandler, "do_POST", lambda self: (self.read_body(), self.send({"error": "no"}, 403)))
    code, _, err = run("publish", folder, "me/draft")
    assert code == 1 and err.splitlines()[-1].startswith("Error: ") and "403" in err.splitlines()[-1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("publish", folder, "me/draft")
    assert code == 1 and "offline" in err.splitlines()[-1].lower()


def test_a_repository_without_an_owner_is_the_users(hub, tmp_path):
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.save_pretrained(tmp_path / "draft", push_to_hub=True, private=True, license="mit")
    card = ModelCard(uploaded(hub)["README.md"].decode())
    assert "CREATE me/draft private" in hub.requests and card.data.license == "mit"
    assert '"me/draft"' in card.text and card.data.library_name == "msd_hf"


def test_a_card_that_cannot_be_read_is_not_replaced(folder, hub, monkeypatch):
    (folder / "README.md").write_text("My own words.\n")
    MSDDraftModel.from_pretrained(folder).push_to_hub("me/draft")
    (folder / "README.md").unlink()
    monkeypatch.setattr(HubHandler, "do_HEAD", lambda self: self.send({}, 403))
    with pytest.raises(OSError):
        MSDDraftModel.from_pretrained(folder).push_to_hub("me/draft")
    assert uploaded(hub)["README.md"] == b"My own words.\n"


def test_a_card_that_the_hub_refuses_is_named(folder, hub, run):
    (folder / "README.md").write_text("---\nbase_model_relation: draft\n---\nWords.\n")
    code, _, err = run("publish", folder, "me/draft")
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("Error: The Hub refuses the card") and "base_model_relation" in line


def test_sharded_weights_are_published_with_their_index(folder):
    draft = MSDDraftModel.from_pretrained(folder)
    draft.save_pretrained(folder, max_shard_size="200KB")
    names = collect_files(folder, "me/draft").keys()
    assert "model.safetensors.index.json" in names and sum(name.endswith(".safetensors") for name in names) > 1


def test_a_draft_of_a_folder_gets_the_name_of_its_target(tmp_path, run):
    """On another machine the name of a folder is of no use, so the commands ask for an id."""
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.config.target_name_or_path = "target"
    draft.save_pretrained(tmp_path)
    code, out, err = run("card", tmp_path)
    assert code == 0 and "add --target OWNER/NAME" in out and "--target TARGET" in err
    code, out, err = run("card", tmp_path, "--target", "acme/toy-llava")
    assert code == 0 and "OWNER/NAME" not in out and "--target" not in err
    assert MSDDraftModel.from_pretrained(tmp_path).config.target_name_or_path == "acme/toy-llava"
    assert "base_model: acme/toy-llava" in (tmp_path / "README.md").read_text()
    for other, message in (("other/target", "made for 'acme/toy-llava'"), ("target", "no id of a model on the Hub")):
        code, _, err = run("card", tmp_path, "--target", other)
        assert code == 1 and message in err
