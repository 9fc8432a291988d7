"""What a draft does on the Hub: `find` looks for drafts, `push_to_hub` publishes one with its card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..hub.card import CARD_NAME, PROVENANCE_NAME
from ..hub.finding import FoundDraft, find_drafts
from ..hub.publishing import check_repo_id, publish_folder
from .experience_file import write_experience


logger = logging.get_logger(__name__)


# Arguments of `save_pretrained` that are about the upload.
_UPLOAD_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
    "license",
    "language",
)


class DraftHubMixin:
    """Methods of a draft that deal with the Hub. The class is also a `PreTrainedModel`."""

    config: Any

    @classmethod
    def find(
        cls,
        target: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        ask_hub: bool = True,
    ) -> list[FoundDraft]:
        """
        Drafts for a target: of the table that comes with the package, of a folder, and of the Hub if it can be
        reached. Drafts that were made for exactly this target come first. Others are for targets of the same kind and
        size.

        Args:
            target (*optional*): the target, its configuration, its folder or its id on the Hub; default: any target.
            folder (`str`, *optional*): a folder with drafts, each in a folder of its own.
            ask_hub (`bool`, defaults to `True`): ask the Hub for drafts whose cards name the target.

        Raises:
            MSDError: when there is no such folder, or the target is neither a folder nor an id of the Hub.
        """
        result = find_drafts(target, folder, ask_hub)
        for note in result.notes:
            logger.warning(note)
        return result.drafts

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        push_to_hub: bool = False,
        save_experience: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Saves the draft, as `PreTrainedModel.save_pretrained` does.

        Args:
            save_directory: the folder.
            push_to_hub (`bool`, defaults to `False`): also upload the draft with its card, to `repo_id` or to a
                repository with the name of the folder.
            save_experience (`bool`, defaults to `False`): also save what automatic trees have learnt, in
                `experience.json`. `from_pretrained` reads it, and calls on the same kind of device, with a target of
                the same kind and size, begin with it. It is not uploaded.
            args, kwargs: further arguments, those of `push_to_hub` among them.
        """
        model: Any = super()
        upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs} if push_to_hub else {}
        model.save_pretrained(save_directory, *args, **kwargs)
        if save_experience and kwargs.get("is_main_process", True):
            write_experience(self, save_directory)
        if push_to_hub:
            repo_id = upload.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repo_id, **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
    ) -> str:
        """
        Uploads the draft with a card. A card that somebody has written into the repository stays. If the draft was
        loaded from a folder, the record of its training and its card come from there.

        Args:
            repo_id, commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags:
                as in `PreTrainedModel.push_to_hub`.
            license, language (*optional*): of the card.

        Returns:
            The address of the repository, or of the pull request.

        Raises:
            MSDError: when the name of the repository is not allowed, or a file holds what looks like a secret.
            OSError: when the Hub cannot be reached, or refuses.
        """
        check_repo_id(repo_id)
        model: Any = self
        loaded_from = self.config._name_or_path
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            for name in (PROVENANCE_NAME, CARD_NAME):
                if loaded_from and Path(loaded_from, name).is_file():
                    shutil.copy(Path(loaded_from, name), folder)
            return publish_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags or (),
                license=license,
                language=language,
            )[0]


__all__ = ["DraftHubMixin"]
