"""The folder of an exported draft: its files, its weights' names, and how it is known."""

from __future__ import annotations

from pathlib import Path

from ...writing.destination import FolderKind, read_config


# vLLM leaves a draft whose architecture begins with `Eagle` as it is when the method is `eagle`.
ARCHITECTURE = "EagleMSDDraft"

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
# Weights besides those of the draft: the rows of the target's head for the draft's vocabulary [V', H], and the
# target's id of each row [V'].
HEAD_WEIGHT, DRAFT_TOKENS = "lm_head.weight", "draft_tokens"


def _owns(path: Path) -> bool:
    return path.name in (CONFIG_NAME, WEIGHTS_NAME)


def _is_export(folder: Path) -> bool:
    return read_config(folder).get("architectures") == [ARCHITECTURE]


EXPORT_FOLDER = FolderKind("a draft exported for vLLM", _owns, _is_export)

__all__ = ["ARCHITECTURE", "CONFIG_NAME", "DRAFT_TOKENS", "EXPORT_FOLDER", "HEAD_WEIGHT", "WEIGHTS_NAME"]
