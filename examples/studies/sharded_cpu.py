"""
Runs `msd-hf train` with FSDP or DeepSpeed on a machine without a GPU, over gloo:

    accelerate launch --config_file examples/configs/fsdp.yaml --num_processes 2 --mixed_precision no \\
        examples/studies/sharded_cpu.py train --target ... --ddp-backend gloo

accelerate reads the configuration of FSDP or DeepSpeed only where it finds a GPU. This script tells it that the CPU is
one; all that follows, the sharding too, is what accelerate, torch and DeepSpeed do on GPUs.
"""

from __future__ import annotations

import os

from accelerate import DistributedType, PartialState

from msd_hf.cli import main


def take_cpu_for_a_gpu() -> None:
    """Lets accelerate shard on the CPU."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda *arguments, **more: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    take_cpu_for_a_gpu()
    main()
