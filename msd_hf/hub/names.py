"""Names of models that may be published: ids of the Hub, and never a path of this machine."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import MSDError
from ..terminal import one_line
from ..writing.redaction import redact_text


MAX_NAME_LENGTH = 200  # characters
# A folder of the Hub's cache holds the id and the commit in its path.
_SNAPSHOT = re.compile(
    r"(?:^|[/\\])models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+?)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})$"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(name: Any) -> bool:
    """Whether a name is `owner/name`, as the Hub allows it. A name without an owner could be anything."""
    if not isinstance(name, str) or name.count("/") != 1 or redact_text(name) != name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name_or_path: Any, revision: Any = None) -> tuple[str | None, str | None]:
    """
    What may be published of the name of a model.

    Args:
        name_or_path: what `from_pretrained` was given.
        revision: commit of the model on the Hub.

    Returns:
        For a model of the Hub, also from the Hub's cache, its id and its commit, if it is known. For another folder,
        the last part of its path and `None`, or `None` twice if nothing is left.
    """
    text = str(name_or_path or "").strip()
    if not text:
        return None, None
    is_folder = os.path.isdir(text)  # unlike `Path.is_dir`, also of a text that is too long for a path
    snapshot = _SNAPSHOT.search(os.path.realpath(text) if is_folder else text.rstrip("/\\"))
    if snapshot is not None:
        return f"{snapshot['owner']}/{snapshot['name']}", snapshot["revision"]
    if not is_folder and is_hub_id(text):
        return text, revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else None
    last = re.split(r"[/\\]", os.path.abspath(text) if is_folder else text.rstrip("/\\"))[-1]
    return one_line(redact_text(last))[:MAX_NAME_LENGTH].lstrip("~") or None, None


def target_or_named(target: str | None, draft_config: Any) -> str:
    """
    The target that was given, else the one that the draft names.

    Args:
        target (*optional*): folder or id of a target.
        draft_config (`MSDDraftConfig`): configuration of the draft.

    Raises:
        MSDError: when there is neither. The name of a folder says nothing on another machine, so only ids count.
    """
    if target is not None:
        return target
    name: Any = getattr(draft_config, "target_name_or_path", None)
    if is_hub_id(name):
        return name
    known = f"only names a folder, {name!r}" if name else "does not name its target"
    raise MSDError(f"--target is missing, and the draft {known}: give the target's folder or Hub id.")


__all__ = ["MAX_NAME_LENGTH", "is_hub_id", "public_name", "target_or_named"]
