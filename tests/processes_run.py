"""One of the processes of `test_processes`: `accelerate launch processes_run.py FOLDER`."""

import json
import sys
from pathlib import Path

from training_runs import build_small_target
from transformers import AutoProcessor

from msd_hf import MSDDraftModel
from msd_hf.evaluation.bench_prompts import first_questions
from msd_hf.evaluation.make_report import report_pair
from msd_hf.evaluation.methods import choose_methods
from msd_hf.processes.group import ALONE, launched
from msd_hf.toy import TARGET_DIR
from msd_hf.training.data.conversations import load_conversations
from msd_hf.training.features.cache import extract_features
from msd_hf.training.regeneration.regenerate import regenerate


SHARDS = {"samples_per_shard": 2, "batch_size": 2}
ANSWERS = {"max_new_tokens": 4, "batch_size": 1, "temperature": 0.8, "seed": 3}


def do_all_jobs(folder, name, processes=ALONE):
    """Features, answers and a benchmark of one small pair, in files that begin with `name`."""
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    target = build_small_target(processor)
    conversations = load_conversations(folder / "train.json")
    extract_features(target, processor, conversations, folder / f"{name}-features", **SHARDS, processes=processes)
    regenerate(target, processor, conversations, folder / f"{name}.jsonl", **ANSWERS, processes=processes)
    draft = MSDDraftModel.from_target(target).eval()
    draft.generation_config.update(num_assistant_tokens=8, tree_depth=3, tree_top_k=2)
    prompts = first_questions(conversations, processor, 5)
    report = report_pair(target, draft, prompts, choose_methods(()), repeats=1, max_new_tokens=6, processes=processes)
    if processes.is_first:
        (folder / f"{name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    processes = launched()
    with processes.together():
        do_all_jobs(Path(sys.argv[1]), "two", processes)
