"""Writes held-out questions of the toy world as a `datasets.DatasetDict`: `python make_data.py FOLDER [NUMBER]`."""

import sys
from itertools import islice, zip_longest

from datasets import Dataset, DatasetDict

from msd_hf.toy import VISUAL_KINDS, make_prompts


folder = sys.argv[1]
number = int(sys.argv[2]) if len(sys.argv) > 2 else 24
kinds = [make_prompts("test", -(-number // len(VISUAL_KINDS)), seed=0, kind=kind) for kind in VISUAL_KINDS]
in_turns = (prompt for prompts in zip_longest(*kinds) for prompt in prompts)
rows = [
    {
        "question": prompt.question,
        "answer": prompt.answer,
        "kind": prompt.kind,
        "facts": list(prompt.facts),
        "image": prompt.image,
    }
    for prompt in islice(in_turns, number)
]
DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(folder)
print(f"Wrote {len(rows)} questions to {folder}")
