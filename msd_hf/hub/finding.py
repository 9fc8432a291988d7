"""Finds drafts for a target: in the table of published drafts, in a folder, and on the Hub by tag."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import get_session
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import MSDError
from ..writing.destination import read_config
from .known_drafts import KnownDraft, known_drafts
from .names import is_hub_id, public_name


LIBRARY = "msd_hf"  # the `library_name` of our cards, which the Hub lists among the tags
_SECONDS_TO_REACH_HUB = 4.0
_MOST_FROM_HUB = 100
_MOST_LAYERS = 4  # of a draft in the original format; a whole model has dozens
# `model_type` of the drafts of this package, and the names of their kinds.
_KIND_NAMES = {"msd_draft": "MSD", "eagle3_draft": "EAGLE-3", "vispec_draft": "ViSpec"}


@dataclass(frozen=True)
class FoundDraft:
    """
    A draft for a target.

    Args:
        name: what `MSDDraftModel.from_pretrained` takes: an id of the Hub, or a folder.
        target: the target that it was made for; `None` if it does not say.
        is_exact: whether that is the target that was asked for. If not, it has the same kind and size, and acceptance
            must be measured.
        kind: method and format.
        license: identifier of the licence; "unknown" if none is stated.
        source: "table", "folder" or "Hub".
    """

    name: str
    target: str | None
    is_exact: bool
    kind: str
    license: str
    source: str


@dataclass(frozen=True)
class SearchResult:
    """
    What was found.

    Args:
        drafts: exact ones first.
        notes: sentences about what could not be asked.
    """

    drafts: list[FoundDraft]
    notes: list[str]


def find_drafts(
    target: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    ask_hub: bool = True,
) -> SearchResult:
    """
    Finds drafts for a target.

    Args:
        target (*optional*): the target, its configuration, its folder or its id on the Hub; by default drafts for all
            targets, without asking the Hub.
        folder (*optional*): a folder that holds drafts, each in a folder of its own, or is one.
        ask_hub: ask the Hub for drafts whose cards name the target, if it can be reached within seconds.

    Raises:
        MSDError: when there is no such folder.
    """
    if folder is not None and not os.path.isdir(folder):
        raise MSDError(f"There is no folder {str(folder)!r}.")
    notes: list[str] = []
    is_reachable = ask_hub and target is not None and _hub_answers()
    name, config = _name_and_config(target, is_reachable)
    candidates = [(draft, "table") for draft in known_drafts()]
    if folder is not None:
        candidates += [(draft, "folder") for draft in _drafts_in(Path(folder))]
    if target is not None and ask_hub and name is not None and is_hub_id(name):
        if is_reachable:
            try:
                candidates += [(draft, "Hub") for draft in _drafts_on_hub(name)]
            except Exception as error:  # an answer of a proxy, a changed format, a lost connection: of many kinds
                notes.append(f"The Hub could not be asked ({type(error).__name__}): this is the table of the package.")
        else:
            notes.append("The Hub cannot be reached: this is the table of the package.")
    if target is not None and config is None:
        notes.append(
            "The target's configuration is not at hand, so drafts for other targets of its kind are not listed."
        )
    found: dict[str, FoundDraft] = {}
    for draft, source in candidates:
        is_exact = name is not None and name.lower() in {other.lower() for other in draft.targets}
        if target is None or is_exact or (config is not None and _has_same_sizes(draft, config)):
            made_for = draft.targets[0] if draft.targets else None
            found.setdefault(draft.name, FoundDraft(draft.name, made_for, is_exact, draft.kind, draft.license, source))
    return SearchResult(sorted(found.values(), key=lambda draft: not draft.is_exact), notes)


def _name_and_config(target: Any, is_reachable: bool) -> tuple[str | None, PreTrainedConfig | None]:
    if target is None:
        return None, None
    if isinstance(target, (str, os.PathLike)):
        if not os.path.isdir(target) and not is_hub_id(str(target)):
            raise MSDError(f"{str(target)!r} is neither a folder nor an id of the Hub (owner/name).")
        config = None
        with suppress(Exception):  # of many kinds; the name alone is enough to look the target up
            config = AutoConfig.from_pretrained(target, local_files_only=not is_reachable, trust_remote_code=False)
        if config is None and os.path.isdir(target):
            raise MSDError(f"The folder {str(target)!r} has no configuration of a target.")
        return public_name(target)[0], config
    config = target.config if isinstance(target, PreTrainedModel) else target
    return public_name(config._name_or_path)[0], config


def _has_same_sizes(draft: KnownDraft, config: PreTrainedConfig) -> bool:
    text_config = config.get_text_config(decoder=True)
    return (draft.target_model_type, draft.target_text_model_type, draft.hidden_size) == (
        config.model_type,
        text_config.model_type,
        getattr(text_config, "hidden_size", None),
    )


# ---- a folder ----


def _drafts_in(folder: Path) -> list[KnownDraft]:
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return [draft for draft in map(_draft_in, folders) if draft is not None]


def _draft_in(folder: Path) -> KnownDraft | None:
    fields = read_config(folder)
    model_type = fields.get("model_type")
    if model_type not in list(_KIND_NAMES):
        known = next((draft for draft in known_drafts() if draft.target_model_type == model_type), None)
        num_layers = fields.get("num_hidden_layers", 1)
        if known is None or "hidden_size" not in fields or not isinstance(num_layers, int):
            return None
        # A whole model of this kind has more layers.
        if num_layers > _MOST_LAYERS:
            return None
        return replace(
            known, name=str(folder), license=_license_in(folder), targets=(), hidden_size=fields["hidden_size"]
        )
    name = fields.get("target_name_or_path")
    return KnownDraft(
        str(folder),
        kind=_KIND_NAMES[model_type],
        license=_license_in(folder),
        targets=(name,) if isinstance(name, str) else (),
        target_model_type=fields.get("target_model_type"),
        target_text_model_type=fields.get("target_text_model_type"),
        hidden_size=fields.get("target_hidden_size") or fields.get("hidden_size"),
    )


def _license_in(folder: Path) -> str:
    with suppress(Exception):  # there is no card, or one that cannot be read
        return str(ModelCard.load(folder / "README.md").data.to_dict()["license"])
    return "unknown"


# ---- the Hub ----


def _hub_answers() -> bool:
    """Whether the Hub answers soon. Its client would try for much longer."""
    with suppress(Exception):  # of many kinds: no network, offline mode, a proxy
        return get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_REACH_HUB).status_code < 500
    return False


def _drafts_on_hub(target: str) -> list[KnownDraft]:
    models = HfApi().list_models(filter=[f"base_model:{target}", LIBRARY], limit=_MOST_FROM_HUB)
    return [KnownDraft(model.id, license=_license_tag(model.tags or []), targets=(target,)) for model in models]


def _license_tag(tags: list[str]) -> str:
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "unknown")


__all__ = ["LIBRARY", "FoundDraft", "SearchResult", "find_drafts"]
