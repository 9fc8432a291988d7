"""Loads a draft of whatever kind with the class of its kind."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..errors import MSDCheckpointError, shown
from .checkpoints import KINDS, is_original, kind_of
from .configuration_msd import MSDDraftConfig
from .eagle3.configuration import Eagle3DraftConfig
from .eagle3.modeling import Eagle3DraftModel
from .files import location_of, read_json, require_file
from .interface import draft_kinds, register_draft
from .modeling_msd import MSDDraftModel
from .vispec.configuration import ViSpecDraftConfig
from .vispec.modeling import ViSpecDraftModel


register_draft(MSDDraftConfig, MSDDraftModel)
register_draft(Eagle3DraftConfig, Eagle3DraftModel)
register_draft(ViSpecDraftConfig, ViSpecDraftModel)


def draft_class_of(name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """
    The class of the draft in a folder or a repository of the Hub; `None` if there is another model.

    Args:
        name_or_path (`str` or `PathLike`): folder, or repository id.
        kwargs: arguments of `from_pretrained`. Only arguments that say where files are count.

    Raises:
        MSDCheckpointError: when the files are damaged.
        OSError: when there is no such folder or repository, or no `config.json` in it.
    """
    name_or_path = os.fspath(name_or_path)
    fields = read_json(require_file(name_or_path, CONFIG_NAME, location_of(kwargs)))
    for config_class, model_class in draft_kinds().items():
        if fields.get("model_type") == config_class.model_type:
            return model_class
    kind = kind_of(name_or_path, fields, kwargs)
    return None if kind is None else draft_kinds()[KINDS[kind].config_class]


class AutoDraft:
    """Drafts by their kind: [`~AutoDraft.from_pretrained`] loads MSD, EAGLE-1, EAGLE-2, EAGLE-3 and ViSpec
    drafts."""

    def __init__(self):
        raise OSError("`AutoDraft` is no model: call `AutoDraft.from_pretrained(...)`.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """
        Loads a draft from a folder or the Hub, with the class of its kind: an [`MSDDraftModel`] for MSD, EAGLE-1 and
        EAGLE-2 (the latter two with `decouple_visual_tokens=False`), an [`Eagle3DraftModel`] for EAGLE-3, a
        [`ViSpecDraftModel`] for ViSpec.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): folder, or repository id.
            kwargs: arguments of the class's own `from_pretrained`, such as `dtype` and `device_map`. Fields of the
                draft's configuration, given by name, take the place of what the checkpoint says.

        Raises:
            MSDCheckpointError: when the checkpoint is no draft of a known kind, or is damaged.
            OSError: when there is no such checkpoint, or it lacks its configuration or its weights.
        """
        pretrained_model_name_or_path = os.fspath(pretrained_model_name_or_path)
        config = kwargs.get("config")
        model_class: Any = draft_kinds().get(type(config)) if isinstance(config, PreTrainedConfig) else None
        if model_class is None:
            model_class = draft_class_of(pretrained_model_name_or_path, **kwargs)
        if model_class is None:
            path = require_file(pretrained_model_name_or_path, CONFIG_NAME, location_of(kwargs))
            model_type = read_json(path).get("model_type")
            if is_original(model_type):  # a whole target of this kind: the sentence of its class is clearer
                return MSDDraftModel.from_pretrained(pretrained_model_name_or_path, **kwargs)
            raise MSDCheckpointError(
                f"{str(pretrained_model_name_or_path)!r} is no draft of a known kind (MSD, EAGLE-1, EAGLE-2, EAGLE-3, "
                f"ViSpec) by its weights or its model_type, {shown(model_type)}."
            )
        return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)


__all__ = ["AutoDraft", "draft_class_of"]
