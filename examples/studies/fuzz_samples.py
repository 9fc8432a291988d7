"""
Random broken samples between good ones, through the data check, `draft-vocab`, `extract`, `regenerate` and `train`.
A broken sample is used or counted, whatever is wrong with it: the good ones are used, nothing is raised, no job hangs
or takes a gigabyte.

    python examples/studies/fuzz_samples.py --cases 220 --seed 0
    python examples/studies/fuzz_samples.py --case 17 --seed 0  # one case, with what it prints

A case follows from the seed and its number. The exit status is 1 if any case failed. Needs Linux.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fuzz_runs import Outcome, run_forked
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from msd_hf.toy import DEMO_IMAGE, TARGET_DIR
from msd_hf.toy.target import build_target_config
from msd_hf.training import (
    MSDTrainer,
    MSDTrainingArguments,
    extract_features,
    load_conversations,
    regenerate,
)
from msd_hf.training.data.check import check_conversations
from msd_hf.training.draft_vocab import count_answer_tokens


MAX_LENGTH = 256
ODD: list[Any] = [
    None,
    True,
    -1,
    10**30,
    float("nan"),
    "",
    " \n",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": [1]}},
    "text",
    "\ud83d half",
    "\x1b[31m",
    "\x00",
    "<image>",
    "<image><image>",
    "</s>",
    "{{ x }}",
    "[/b]",
    "\u2028\u202e",
    "ä" * 5000,
    "word " * 50000,
]
FILES = ["deep.png", "float.tiff", "inf.tiff", "long.tiff", "cut.png", "text.png", "empty.png", "dot.png", "thin.png"]
FILES += ["bomb.png", "turned.jpg", "chunk.png", "palette.gif", "cmyk.jpg", ".", "..", "nowhere.png", "/etc/passwd"]
FILES += ["a" * 5000, "\0.png", "\udcff.png", "loop", "http://example.org/a.png"]


def write_images(folder: Path) -> None:
    """Writes pictures of odd kinds, whole and broken."""
    picture = Image.open(DEMO_IMAGE).convert("RGB")
    picture.save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    Image.new("I;16", (40, 30), 40000).save(folder / "deep.png")
    Image.new("F", (40, 30), 0.5).save(folder / "float.tiff")
    Image.new("F", (40, 30), float("inf")).save(folder / "inf.tiff")
    Image.new("I", (40, 30), 10**9).save(folder / "long.tiff")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    picture.resize((1, 1)).save(folder / "dot.png")
    picture.resize((4000, 2)).save(folder / "thin.png")
    picture.convert("P").save(folder / "palette.gif")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "chunk.png").write_bytes(content.replace(b"IDAT", b"I\0\0T"))
    (folder / "text.png").write_text("text")
    (folder / "empty.png").touch()
    (folder / "loop").symlink_to(folder / "loop")


def good(number: int) -> dict[str, Any]:
    """A sample that can be used; odd numbers have a picture."""
    question = "<image>\nWhat is there?" if number % 2 else "What is there?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"There are {number} red circles."}]
    return {"id": f"good {number}", "conversations": turns, **({"image": "good.png"} if number % 2 else {})}


def _paths(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of each value inside a sample."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [path for key, item in items for path in _paths(item, (*place, key))]


def draw(rng: random.Random, folder: Path) -> Any:
    """A sample with one to three changes: a value replaced, removed, renamed or doubled, or another picture."""
    sample: Any = good(rng.randrange(2))
    if rng.random() < 0.3:
        sample = {
            "messages": [{"role": turn["from"], "content": turn["value"]} for turn in sample["conversations"]],
            **{key: value for key, value in sample.items() if key != "conversations"},
        }
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choice(["replace", "replace", "remove", "key", "double", "picture", "picture"])
        if kind == "picture":
            sample = {**good(1), "image": _picture(rng, folder)}
            continue
        paths = _paths(sample)
        if not paths:
            break
        *way, last = rng.choice(paths)
        parent = sample
        for key in way:
            parent = parent[key]
        if kind == "replace":
            parent[last] = rng.choice(ODD)
        elif kind == "remove":
            del parent[last]
        elif kind == "double":
            parent[last] = [parent[last]] * 2
        elif isinstance(parent, dict):
            parent[str(rng.choice(ODD))] = parent.pop(last)
    return rng.choice(ODD) if rng.random() < 0.05 else sample


def _picture(rng: random.Random, folder: Path) -> Any:
    content = (folder / "good.png").read_bytes()
    choices: list[Any] = [*FILES, *ODD, {"bytes": "text"}, {"bytes": 3}, {"bytes": b"text"}, {"bytes": content[:200]}]
    choices += [
        {"bytes": [1, 2]},
        {"path": 3},
        {"path": None},
        {"bytes": None, "path": "cut.png"},
        ["good.png", "good.png"],
    ]
    closed = Image.open(BytesIO(content[:200]))
    choices += [closed, Image.new("F", (5, 5), float("nan")), Image.new("RGB", (0, 5)), object(), {1, 2}, b"text"]
    return rng.choice(choices)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class Jobs:
    """The jobs that read samples, with a tiny target."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(TARGET_DIR)
        config = build_target_config(self.processor, num_layers=2)
        config.text_config.hidden_size = config.text_config.intermediate_size = 64
        config.text_config.head_dim = 16
        config.vision_config.num_hidden_layers = 1
        torch.manual_seed(0)
        self.target = LlavaForConditionalGeneration(config).eval()
        tokenizer = self.processor.tokenizer
        self.target.generation_config.eos_token_id = tokenizer.eos_token_id
        self.target.generation_config.pad_token_id = tokenizer.pad_token_id
        self.jobs: dict[str, Callable[[Any], int]] = {
            "check": self.check,
            "draft-vocab": self.count,
            "extract": self.extract,
            "regenerate": self.regenerate,
            "train": self.train,
        }

    def check(self, data: Any) -> int:
        report = check_conversations(data, self.processor, MAX_LENGTH)
        assert report.num_ok + report.reasons.total() == report.num_samples
        return report.num_ok

    def count(self, data: Any) -> int:
        return count_answer_tokens([data], self.processor, self.target.config.text_config.vocab_size).num_samples

    def extract(self, data: Any) -> int:
        report = extract_features(self.target, self.processor, data, "features", max_length=MAX_LENGTH)
        assert report.num_samples + sum(report.skipped.values()) == len(data)
        return report.num_samples

    def regenerate(self, data: Any) -> int:
        report = regenerate(self.target, self.processor, data, "out.jsonl", max_new_tokens=4)
        again = load_conversations("out.jsonl", self.folder)
        return min(report.num_samples, sum(1 for index in range(len(again)) if again[index].messages))

    def train(self, data: Any) -> int:
        fields = {"curriculum": "text", "max_steps": 2, "per_device_train_batch_size": len(data), "use_cpu": True}
        fields |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_length": MAX_LENGTH}
        arguments = MSDTrainingArguments(output_dir="draft", dataloader_pin_memory=False, **fields)
        trainer = MSDTrainer(
            target=self.target, processing_class=self.processor, args=arguments, text_dataset=data, eval_dataset=data
        )
        trainer.train()
        return len(data) - sum(trainer.provenance()["data"]["skipped"].values())


def run_case(jobs: Jobs, seed: int, number: int) -> tuple[str, Any, Outcome]:
    """Runs one job on a broken sample between good ones. The status is 3 if fewer samples were used than are good."""
    rng = random.Random(f"{seed} {number}")
    broken = draw(rng, jobs.folder)
    name = rng.choice([*jobs.jobs])
    samples = [good(0), broken, good(1), good(2)]
    in_file = rng.random() < 0.5 and isinstance(broken, dict) and _is_json(broken)
    with tempfile.TemporaryDirectory(prefix="fuzz-case-") as folder:

        def case() -> int:
            os.chdir(tempfile.mkdtemp(dir=folder))
            data: Any = samples
            if in_file:
                data = Path("data.jsonl").resolve()
                data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            return 0 if jobs.jobs[name](load_conversations(data, jobs.folder)) >= 3 else 3

        return name, broken, run_forked(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="Run one case and show what it prints.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-images-") as folder:
        write_images(Path(folder))
        jobs = Jobs(Path(folder))
        numbers = range(args.cases) if args.case is None else [args.case]
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        slowest = most = 0.0
        for number in numbers:
            name, broken, outcome = run_case(jobs, args.seed, number)
            found = problems_of(outcome)
            counts[name]["failed" if found else "ok"] += 1
            slowest, most = max(slowest, outcome.seconds), max(most, outcome.num_bytes)
            if found or args.case is not None:
                last = (outcome.errors.strip().splitlines() or [""])[-1]
                print(
                    f"{number} {name}: {', '.join(found)}: {ascii(broken)[:300]}\n    {ascii(last)[:300]}", flush=True
                )
            if args.case is not None:
                print(outcome.output, outcome.errors, sep="\n")
        for name, count in counts.items():
            print(f"{name:12} " + ", ".join(f"{what} {number}" for what, number in sorted(count.items())))
        failed = sum(count["failed"] for count in counts.values())
        print(f"{failed} of {len(numbers)} failed; slowest {slowest:.1f} s, most memory {most / 1e6:.0f} MB")
        sys.exit(1 if failed else 0)


def problems_of(outcome: Outcome) -> list[str]:
    """What is wrong with the end of a job."""
    found = outcome.problems()
    if outcome.status == 3:
        found.append("good samples were lost")
    elif outcome.status != 0 and not found:
        found.append(f"status {outcome.status}")
    return found


if __name__ == "__main__":
    main()
