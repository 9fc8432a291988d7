"""Under DeepSpeed ZeRO-3, transformers shards every model that it loads. The target must stay whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..errors import MSDUnsupportedError


@contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """
    Inside the block models are loaded whole. DeepSpeed makes the weights of a sharded model whole for the forward of
    its own engine only, and a target has no engine. The draft is sharded later, when `Trainer` hands it to DeepSpeed.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    config = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def check_whole(target: nn.Module) -> None:
    """
    Refuses a target that DeepSpeed has sharded.

    Raises:
        MSDUnsupportedError: says when to load the target.
    """
    if any(hasattr(weight, "ds_id") for weight in target.parameters()):
        raise MSDUnsupportedError(
            "The target was loaded after the training arguments, so that DeepSpeed ZeRO-3 has sharded it, and it "
            "cannot run: load the target before you make `MSDTrainingArguments`."
        )


__all__ = ["check_whole", "loaded_whole"]
