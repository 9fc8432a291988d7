"""A target whose layers are spread over the processes of a training, each of which has its own batch."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..decoders import decoder_of
from ..errors import MSDError, MSDUnsupportedError


def check_can_shard(target: PreTrainedModel, num_processes: int) -> None:
    """
    Refuses to spread a target that is alone, quantised or placed already.

    Raises:
        MSDError: names the reason, and what to do.
    """
    if num_processes < 2:
        raise MSDError("`shard_target` spreads the target over processes: start several with `accelerate launch`.")
    if getattr(target, "is_quantized", False) or hasattr(target, "hf_device_map"):
        raise MSDError(
            "`shard_target` cannot be combined with a quantised target, or with one that `device_map` has placed: "
            "load it in its own dtype, without a device map."
        )


def check_not_tensor_parallel(target: PreTrainedModel) -> None:
    """
    Refuses a target that `tp_plan` has split: all of its processes would need the same batch, but each process of a
    training has its own.

    Raises:
        MSDUnsupportedError: says what to do.
    """
    if any(isinstance(weight, DTensor) for weight in target.parameters()) or getattr(target, "_tp_size", None):
        raise MSDUnsupportedError(
            "The target is split by `tp_plan`, so that all processes would need the same batch, but in training each "
            "has its own: load it without `tp_plan`, and set `shard_target=True`."
        )


def shard_target(target: PreTrainedModel, device: torch.device) -> None:
    """
    Spreads the weights of the target's decoder layers over all processes (FSDP2). The weights of a layer are gathered
    for its forward and freed after it.

    Embedding, head and vision tower stay whole: the first two are used outside of the target's forward, and a batch
    without images, which does not run the tower, would leave the other processes waiting for it.

    Args:
        target: the target, on `device`.
        device: the device of this process.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in decoder_of(target).layers:
        fully_shard(layer, mesh=mesh)


__all__ = ["check_can_shard", "check_not_tensor_parallel", "shard_target"]
