"""What the entry point `lmms_eval.models` names: the models that lmms-eval finds where this package is installed."""

from __future__ import annotations

from typing import Any

from ...errors import MSDError


# The class of each model. It is imported when lmms-eval needs it, because its base class needs packages of its own.
CHAT_CLASSES = {
    "msd_llava": "llava.MSDLlava",
    "msd_qwen2_5_vl": "qwen2_5_vl.MSDQwen25VL",
    "msd_qwen3_vl": "qwen3_vl.MSDQwen3VL",
}
SIMPLE_CLASSES = {"msd_qwen2_vl": "qwen2_vl.MSDQwen2VL"}  # lmms-eval has no other class for Qwen2-VL


def model_manifests() -> list[Any]:
    """
    The manifests of all models, for the registry of lmms-eval.

    Raises:
        MSDError: when lmms-eval is missing, or has no registry that takes models of other packages.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise MSDError(
            'The models for lmms-eval need lmms-eval 0.7.3 or newer: pip install "msd-hf[lmms-eval]".'
        ) from error
    package = __name__.rpartition(".")[0]
    return [
        *(ModelManifest(name, chat_class_path=f"{package}.{path}") for name, path in CHAT_CLASSES.items()),
        *(ModelManifest(name, simple_class_path=f"{package}.{path}") for name, path in SIMPLE_CLASSES.items()),
    ]


__all__ = ["CHAT_CLASSES", "SIMPLE_CLASSES", "model_manifests"]
