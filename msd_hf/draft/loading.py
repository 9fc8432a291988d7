"""What `from_pretrained` checks before it loads a draft, and after."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME

from ..compiled.compile import is_compiled
from ..errors import MSDCheckpointError
from ..tree.settings import TreeSettings
from .checkpoints import read_config
from .eagle3.conventions import renamed
from .files import errors_name_file, find_file, location_of, read_json
from .weights import check_headers, check_memory, find_weight_files, raise_problems, read_headers


def prepare_loading(
    model_class: Any, name_or_path: str | Path, config: Any, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """
    Reads configuration and settings of a draft, and checks its weights by their headers. Nothing large is allocated.

    Args:
        model_class: class of the draft.
        name_or_path (`str` or `Path`): folder, or repository id.
        config: argument `config` of `from_pretrained`: a configuration, where to find one, or `None`.
        kwargs: the other arguments of `from_pretrained`.

    Returns:
        The configuration, and the arguments that remain, with the settings as `generation_config`.

    Raises:
        MSDCheckpointError: when a file is damaged, or does not hold what it should.
        OSError: when the checkpoint or its configuration is missing.
    """
    kwargs = dict(kwargs)
    is_published = False
    if not isinstance(config, PreTrainedConfig):
        # As in any `from_pretrained`, a field of the configuration may be overridden by name.
        names = [field.name for field in dataclasses.fields(model_class.config_class) if field.name != "dtype"]
        overrides = {name: kwargs.pop(name) for name in (*names, "output_attentions") if name in kwargs}
        source = name_or_path if config is None else config
        config, is_published, key_mapping = read_config(source, model_class.config_class, overrides, **kwargs)
        if key_mapping and kwargs.get("key_mapping") is None:
            kwargs["key_mapping"] = key_mapping
    location = location_of(kwargs)
    _check_no_adapter(name_or_path, location)
    if kwargs.get("gguf_file") is None:
        _check_weights(model_class, name_or_path, config, kwargs)
    # The `generation_config.json` of a published checkpoint is a copy of the target's.
    if kwargs.get("generation_config") is None and not is_published:
        kwargs["generation_config"] = _read_settings(name_or_path, location)
    return config, kwargs


def _check_no_adapter(name_or_path: str | Path, location: Mapping[str, Any]) -> None:
    # transformers would load the weights of the model that the adapter names in place of the draft's.
    path = find_file(name_or_path, ADAPTER_CONFIG_NAME, location)
    if path is not None:
        raise MSDCheckpointError(
            f"{str(path)!r} makes this checkpoint an adapter: merge the adapter into the draft, and save the draft."
        )


def _check_weights(model_class: Any, name_or_path: str | Path, config: Any, kwargs: Mapping[str, Any]) -> None:
    choice = {name: kwargs.get(name) for name in ("variant", "use_safetensors")}
    files = find_weight_files(name_or_path, location_of(kwargs), **choice)
    is_trusted_pickle = kwargs.get("weights_only") is False and files and files[0].suffix != ".safetensors"
    if not files or is_trusted_pickle:
        return
    headers = read_headers(files)
    with errors_name_file(name_or_path, "a draft"), torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    if is_quantised(config):
        check_memory(name_or_path, model, files)  # quantised weights have other names and dtypes
    else:
        mapping = kwargs.get("key_mapping") or {}
        own = {renamed(name, mapping): weight for name, weight in headers.items()}
        check_headers(name_or_path, model, own, kwargs.get("ignore_mismatched_sizes", False))


def _read_settings(name_or_path: str | Path, location: Mapping[str, Any]) -> GenerationConfig | None:
    path = find_file(name_or_path, GENERATION_CONFIG_NAME, location)
    if path is None:
        return None
    fields = read_json(path)
    with errors_name_file(path, "the settings of a draft"):
        for name in fields:
            if hasattr(GenerationConfig, name):  # it would hide a method
                raise ValueError(f"there is no setting `{name[:200]}`.")
        settings = GenerationConfig.from_dict(fields)
        TreeSettings.from_generation_config(settings)
        is_compiled(settings)
    return settings


def is_quantised(config: Any) -> bool:
    """Whether the weights of a checkpoint are quantised."""
    return getattr(config, "quantization_config", None) is not None


def errors_of_quantised_weights(name_or_path: Any, config: Any) -> contextlib.AbstractContextManager[None]:
    """Names the checkpoint in errors about its own quantisation, of which only transformers knows the fields."""
    if not is_quantised(config):
        return contextlib.nullcontext()
    return errors_name_file(name_or_path, "a draft with quantised weights")


def check_loading_info(name_or_path: str | Path, loading_info: Mapping[str, Any]) -> None:
    """
    Turns the warnings of `from_pretrained` into an error, because a wrong weight is hard to notice: it only makes the
    draft slow.

    Raises:
        MSDCheckpointError: names every key that is missing, unexpected or of the wrong shape.
    """
    kinds = (
        ("missing", "missing_keys"),
        ("unexpected", "unexpected_keys"),
        ("of the wrong shape", "mismatched_keys"),
    )
    raise_problems(
        name_or_path,
        {what: sorted(_name_of(key) for key in loading_info[name]) for what, name in kinds if loading_info.get(name)},
    )


def _name_of(key: str | tuple[Any, ...]) -> str:
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} ({list(found)}, expected {list(expected)})"


def check_draft_vocab(name_or_path: str | Path, tokens: torch.Tensor | None) -> None:
    """
    Checks the draft's own vocabulary as it was read from a file.

    Args:
        name_or_path: the checkpoint.
        tokens (`torch.LongTensor` of shape `[V']`, *optional*): `draft_vocab` of the draft.

    Raises:
        MSDCheckpointError: when ids are negative, repeated or not in increasing order.
    """
    if tokens is None or tokens.is_meta:
        return
    if int(tokens[0]) < 0 or bool((tokens[1:] <= tokens[:-1]).any()):
        raise MSDCheckpointError(
            f"The weight `draft_vocab` in {str(name_or_path)!r} is no vocabulary: it must hold token ids of at least "
            f"0 in increasing order, each of them once, got {tokens.tolist()[:8]}{'...' * (len(tokens) > 8)}."
        )


__all__ = [
    "check_draft_vocab",
    "check_loading_info",
    "errors_of_quantised_weights",
    "prepare_loading",
]
