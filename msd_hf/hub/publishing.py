"""Publishing a draft: the files that others need and its card, without secrets and paths of this machine."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import MSDError
from ..terminal import one_line
from ..writing.redaction import REDACTED, redact, redact_text
from .card import CARD_NAME, PROVENANCE_NAME, is_generated, make_card, read_draft_config, read_text


_JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", PROVENANCE_NAME)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_LICENSE = re.compile(r"(LICEN[SC]E|NOTICE)(\.md|\.txt)?")
_LARGEST_HEADER = 2**24  # bytes


def check_repo_id(repo_id: str) -> None:
    """
    Checks the name of a repository.

    Raises:
        MSDError: when the Hub does not allow it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MSDError(f"{repo_id!r} is no name of a repository (owner/name): {one_line(str(error))}") from error


def collect_files(folder: str | Path, repo_id: str, **fields: Any) -> dict[str, bytes | Path]:
    """
    The files of a draft as they are published.

    Args:
        folder: the draft's folder.
        repo_id: its id on the Hub, for the usage in its card.
        fields: licence, language and tags of the card, see [`~msd_hf.hub.card.make_card`].

    Returns:
        Path in the repository -> content, or the path of a file of weights. Checkpoints, data, `training_args.bin` and
        whatever else lies in the folder are left out.

    Raises:
        MSDError: when the folder holds no draft or no weights, or a file holds what looks like a secret or a path of
            this machine.
    """
    folder = Path(folder)
    read_draft_config(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files: dict[str, bytes | Path] = {}
    for path in paths:
        if path.name in _JSON_FILES:
            files[path.name] = _clean_json(path)
        elif _WEIGHTS.fullmatch(path.name):
            _check_text(path, _header(path), folder)
            files[path.name] = path
        elif _LICENSE.fullmatch(path.name):
            files[path.name] = _check_text(path, read_text(path), folder).encode()
    if not any(isinstance(content, Path) for content in files.values()):
        raise MSDError(f"{str(folder)!r} holds no weights (`model.safetensors`).")
    own = folder / CARD_NAME
    if own.is_file() and not is_generated(read_text(own)):
        files[CARD_NAME] = _check_text(own, read_text(own), folder).encode()
    else:
        files[CARD_NAME] = _check_text(own, str(make_card(folder, repo_id, **fields)), folder).encode()
    return files


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """
    Uploads a draft in one commit; makes the repository if there is none. A card that somebody has written, on this
    machine or in the repository, is not replaced by a generated one.

    Args:
        folder: the draft's folder.
        repo_id: owner and name of the repository.
        private, token, commit_message, commit_description, revision, create_pr: as in `HfApi.create_commit` and
            `HfApi.create_repo`.
        license, language, tags: of the card.

    Returns:
        The address of the repository, or of the pull request, and the names of the uploaded files.

    Raises:
        MSDError: as [`collect_files`] does, before anything is sent.
        OSError: when the Hub cannot be reached, or refuses.
    """
    check_repo_id(repo_id)
    files = collect_files(folder, repo_id, license=license, language=language, tags=tags)
    api = HfApi(library_name="msd_hf")
    url = api.create_repo(repo_id, private=private, token=token, exist_ok=True)
    if url.repo_id != repo_id:  # the user's name was left out
        repo_id = url.repo_id
        files = collect_files(folder, repo_id, license=license, language=language, tags=tags)
    if is_generated(_decoded(files[CARD_NAME])) and _has_own_card(api, repo_id, token, revision):
        del files[CARD_NAME]
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=redact_text(commit_message or "Upload an MSD draft"),
            commit_description=None if commit_description is None else redact_text(commit_description),
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
    except ValueError as error:  # the Hub checks the metadata of a card
        raise MSDError(f"The Hub refuses the card: {one_line(str(error))}") from error
    return str(commit.pr_url or url), list(files)


def _has_own_card(api: HfApi, repo_id: str, token: Any, revision: str | None) -> bool:
    """Whether the repository has a card that somebody has written."""
    if not api.file_exists(repo_id, CARD_NAME, token=token, revision=revision):
        return False
    path = api.hf_hub_download(repo_id, CARD_NAME, token=token, revision=revision)
    return not is_generated(Path(path).read_text(encoding="utf-8", errors="replace"))


def _clean_json(path: Path) -> bytes:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise MSDError(f"{str(path)!r} is not JSON: {one_line(str(error))}.") from error
    return (json.dumps(redact(content), indent=2, ensure_ascii=False) + "\n").encode()


def _header(path: Path) -> str:
    """The header of a file of weights, which may hold any texts."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if size > _LARGEST_HEADER:
            raise MSDError(f"{str(path)!r} is no file of weights.")
        return file.read(size).decode("utf-8", errors="replace")


def _check_text(path: Path, text: str, folder: Path) -> str:
    """Refuses a text with a secret or with a path of this machine: it is the user's, and is not changed."""
    advice = "Remove it, and publish again."
    # A short path such as `/tmp` says nothing about a machine.
    places = [str(place) for place in (folder.resolve().parent, Path.cwd()) if len(place.parts) > 2]
    paths = re.compile("|".join(rf"(?<![\w./-]){re.escape(place)}(?![\w.-])" for place in [*places, str(Path.home())]))
    for number, line in enumerate(text.splitlines(), start=1):
        if redact_text(line).count(REDACTED) > line.count(REDACTED):
            raise MSDError(f"Line {number} of {path.name!r} holds what looks like a secret. {advice}")
        found = paths.search(line)
        if found is not None:
            raise MSDError(f"Line {number} of {path.name!r} holds a path of this machine, {found[0]!r}. {advice}")
    return text


def _decoded(content: bytes | Path) -> str:
    return content.decode() if isinstance(content, bytes) else ""


__all__ = ["check_repo_id", "collect_files", "publish_folder"]
