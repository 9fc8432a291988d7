"""A training of `test_processes`, alone or launched: `training_processes_run.py FOLDER NAME [CHECKPOINT]`."""

import sys
from pathlib import Path

from accelerate import PartialState
from training_runs import build_small_target, make_trainer
from transformers import AutoProcessor

from msd_hf.toy import TARGET_DIR
from msd_hf.training import load_conversations


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    samples = list(load_conversations(folder / "train.json"))
    data = {kind: [s for s in samples if bool(s.images) == (kind == "visual")][:20] for kind in ("text", "visual")}
    trainer = make_trainer(
        build_small_target(processor),
        processor,
        data,
        folder / name,
        max_steps=6,  # 3 epochs
        per_device_train_batch_size=8 // PartialState(cpu=True).num_processes,
        curriculum="mixed",
        hard_example_mixing=0.5,
        save_strategy="steps",
        save_steps=3,
        max_length=128,
    )
    trainer.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
