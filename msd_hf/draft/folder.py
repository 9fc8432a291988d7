"""The folder of a draft: the files that are written into it, and by which it is known."""

from __future__ import annotations

import re
from pathlib import Path

from ..hub.card import PROVENANCE_NAME, is_generated
from ..writing.destination import FolderKind, read_config
from .configuration_msd import MSDDraftConfig
from .eagle3.configuration import Eagle3DraftConfig
from .vispec.configuration import ViSpecDraftConfig


_FILE_NAMES = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors"
    rf"|model\.safetensors\.index\.json|training_args\.bin|{re.escape(PROVENANCE_NAME)}"
)


def _owns(path: Path) -> bool:
    if path.name == "README.md":
        return is_generated(path.read_text(encoding="utf-8", errors="replace"))
    return _FILE_NAMES.fullmatch(path.name) is not None


def _is_draft(folder: Path) -> bool:
    kinds = (MSDDraftConfig, Eagle3DraftConfig, ViSpecDraftConfig)
    return read_config(folder).get("model_type") in [kind.model_type for kind in kinds]


# A folder with checkpoints of a training run is not replaced: they are worth more than the draft.
DRAFT_FOLDER = FolderKind("an MSD draft", _owns, _is_draft)

__all__ = ["DRAFT_FOLDER", "PROVENANCE_NAME"]
