"""What the configurations of all kinds of drafts share: limits, reading and saving."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import CONFIG_NAME, logging

from .files import LOCATION_ARGUMENTS, errors_name_file, location_of, read_json, require_file
from .limits import check_dtype, check_limits, check_rope
from .readings import OtherReadings, other_ropes


logger = logging.get_logger(__name__)


# What a configuration says about the one target that the draft is for.
TARGET_FIELDS = ("target_name_or_path", "target_revision", "target_fingerprint")
# Written into every `config.json`, for those who meet the file without this package.
HINT = {"_how_to_load": "pip install msd-hf, then `import msd_hf` before AutoModel or MSDDraftModel"}

# Entries of a `config.json` besides the fields of the configuration: names of older releases of transformers, and the
# settings of quantised weights.
_OTHER_ENTRIES = (
    "_commit_hash",
    "_name_or_path",
    "model_type",
    "output_attentions",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
)


if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedConfig as _Base
else:
    _Base = object


class DraftConfigMixin(_Base):
    """Methods of a draft's configuration. The class is also a `PreTrainedConfig` with the fields of a LLaMA layer."""

    hidden_size: Any
    num_attention_heads: Any
    num_key_value_heads: Any
    head_dim: Any

    def __post_init__(self, **kwargs):
        check_limits(self)
        check_dtype(kwargs.get("torch_dtype"))
        check_rope(kwargs.get("rope_scaling"), self.head_dim)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check_parts()

    def validate_architecture(self):
        """Checks all fields as they are now. `@strict` calls this method."""
        check_limits(self)
        self._check_parts()

    def _check_parts(self) -> None:
        """Checks what is particular to a kind of draft."""

    def other_readings(self, target_config: PreTrainedConfig, num_layers: int) -> list[OtherReadings]:
        """
        The fields that may have been read wrongly, with the other values that the weights fit, in the order in which
        they matter.

        Args:
            target_config: configuration of the target.
            num_layers (`int`): decoder layers of the target.
        """
        return [other_ropes(self, target_config)]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """
        Reads a `config.json` from a folder or the Hub.

        Returns:
            Its fields, and the arguments that do not locate the file.

        Raises:
            MSDCheckpointError: when the file is no JSON object, or names a field twice.
            OSError: when there is no such file.
        """
        path = require_file(pretrained_model_name_or_path, CONFIG_NAME, location_of(kwargs))
        return read_json(path), {name: value for name, value in kwargs.items() if name not in LOCATION_ARGUMENTS}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        Makes a configuration of the fields of a `config.json`. Fields that a draft does not have are left out with a
        warning: transformers reads many settings from a configuration that are none of a draft's.

        Raises:
            MSDCheckpointError: names the field that has a wrong type or lies outside its limits.
        """
        config_dict = {name: value for name, value in config_dict.items() if name not in HINT}
        known = {field.name for field in dataclasses.fields(cls)} | set(_OTHER_ENTRIES)
        unknown = sorted(set(config_dict) - known)
        if unknown:
            logger.warning_once(f"The configuration of a draft has no fields {', '.join(unknown)[:300]}: left out.")
        fields = {name: value for name, value in config_dict.items() if name in known}
        source = Path(kwargs.get("name_or_path", ""))
        with errors_name_file(source if source.is_file() else source / CONFIG_NAME, "the configuration of a draft"):
            return super().from_dict(fields, **kwargs)

    def to_diff_dict(self):
        """
        The fields that are saved. What is not known of the target is left out, and a hint says how to load the draft,
        because the Auto classes know drafts only after `import msd_hf`.
        """
        fields = super().to_diff_dict()
        unknown = {name for name in TARGET_FIELDS if fields.get(name) is None}
        return {**{name: value for name, value in fields.items() if name not in unknown}, **HINT}


__all__ = ["HINT", "TARGET_FIELDS", "DraftConfigMixin"]
