"""One process of `test_tensor_parallel`: `torchrun tensor_parallel_run.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import LlavaForConditionalGeneration

from msd_hf import MSDDraftModel


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    target = LlavaForConditionalGeneration.from_pretrained(folder / "target", dtype=torch.float64, tp_plan="auto")
    draft = MSDDraftModel.from_pretrained(folder / "draft", dtype=torch.float64)
    inputs = torch.load(folder / "inputs.pt")
    # Older releases store this process's shard as an ordinary parameter.
    sizes = {
        name: (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
        for name, weight in target.named_parameters()
    }
    outputs = []
    for do_sample in (False, True):
        torch.manual_seed(0)
        outputs.append(
            target.generate(
                **inputs,
                max_new_tokens=12,
                do_sample=do_sample,
                assistant_model=draft,
                return_dict_in_generate=True,
            )
        )
    report = {
        "plan": list(target.tp_plan),
        "sizes": sizes,
        "tokens": [output.sequences[0].tolist() for output in outputs],
        "acceptance_lengths": [output.acceptance_lengths[0] for output in outputs],
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
