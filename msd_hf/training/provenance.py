"""`training_provenance.json`: how a draft was trained, in a file beside its weights."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import TrainingArguments

from ..draft.folder import PROVENANCE_NAME
from ..version import __version__
from ..writing.redaction import redact, redact_command, redact_text, secret_values
from ..writing.saving import replace_text


def write_provenance(folder: str | Path, provenance: dict[str, Any]) -> Path:
    """
    Writes `provenance` to `training_provenance.json` in `folder`, without secrets and local paths; returns the path of
    the file.
    """
    path = Path(folder) / PROVENANCE_NAME
    text = json.dumps(redact(provenance), indent=2, default=lambda value: redact_text(str(value)))
    replace_text(path, text + "\n")
    return path


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """Reads the provenance that `write_provenance` wrote; empty if there is no such file."""
    path = Path(folder) / PROVENANCE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_run(arguments: TrainingArguments) -> dict[str, Any]:
    """
    Describes a run: command, versions, number of processes, and the arguments that differ from their defaults. Secrets
    and local paths are removed, because the description is published with the draft.
    """
    return {
        "command": redact_command(sys.argv, secret_values(vars(arguments))),
        "versions": {
            "msd_hf": __version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "num_processes": arguments.world_size,
        "arguments": _changed_arguments(arguments),
    }


def _changed_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    values = redact(arguments.to_dict(), secrets=secret_values(vars(arguments)))
    changed = {}
    for field in dataclasses.fields(arguments):
        if field.name not in values or field.name in ("output_dir", "logging_dir", "hub_token"):
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        if values[field.name] != default and field.default_factory is dataclasses.MISSING:
            changed[field.name] = values[field.name]
    return changed


__all__ = ["PROVENANCE_NAME", "describe_run", "read_provenance", "write_provenance"]
