"""
Kills training, extraction, regeneration and conversion, starts them again until they are done, and compares the end
with that of a run that was not killed.

    python examples/studies/kills.py --kills 240

A run is killed at a random time, or at a random file operation: before a file is opened for writing, renamed, removed
or flushed to the disk, or in the middle of writing it. Afterwards the files must equal those of the uninterrupted run,
files of the user beside them must be as before, and no temporary file may be left. `--only` chooses jobs. The cases
depend on `--seed` and the jobs alone; `--results FILE` keeps the outcome of each, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import safetensors.torch
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, set_seed
from transformers.utils import logging

from msd_hf import MSDDraftModel, cli
from msd_hf.loading import load_target_and_processor
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.dataset import ToySamples
from msd_hf.toy.target import build_target_config
from msd_hf.toy.training_data import write_training_data
from msd_hf.training import extract_features, load_conversations, regenerate
from msd_hf.training.script import run_training


Job = Callable[[Path, Path, bool], None]
KILLED = 137
OVERWRITE = "convert --overwrite"
_PATH_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod")
# Times and versions differ from run to run, and the command of a resumed run has an argument more.
_UNSTABLE = ("training_args.bin", "training_provenance.json", "trainer_state.json")
_FOREIGN = {"notes.txt": "notes", "other/weights.bin": "weights", "out.old/notes.txt": "old", "sub/out.txt": "text"}


# What is run: jobs on the inputs in `shared`, which write to `folder`


def train(shared: Path, folder: Path, again: bool, **more: Any) -> None:
    data = {"--text-data": "data/text.json", "--visual-data": "data/visual.json"}
    if more.pop("cached", False):
        data = {"--text-features": "features/text", "--visual-features": "features/visual"}
    fields = {
        "--target": shared / "target",
        "--image-folder": shared / "data",
        **{name: shared / path for name, path in data.items()},
        "--output-dir": folder / "out",
        "--max-steps": 6,
        "--save-steps": 2,
        "--per-device-train-batch-size": 2,
        "--learning-rate": 1e-3,
        "--warmup-steps": 0,
        "--logging-steps": 1,
        "--max-length": 300,
        "--report-to": "none",
        "--use-cpu": True,
        "--disable-tqdm": True,
        **{f"--{name.replace('_', '-')}": value for name, value in more.items()},
    }
    argv = [str(part) for item in fields.items() for part in item]
    run_training([*argv, *(["--resume-from-checkpoint", "True"] if again else [])])


def train_with_evaluation(shared: Path, folder: Path, again: bool) -> None:
    best = {"eval_samples": 1, "eval_prompts": 1, "eval_max_new_tokens": 2, "eval_strategy": "steps", "eval_steps": 2}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    train(shared, folder, again, **best)


def extract(shared: Path, folder: Path, again: bool, data: str = "visual", output: str = "out") -> None:
    target, processor = load_target_and_processor(shared / "target")
    conversations = load_conversations(shared / "data" / f"{data}.json")
    extract_features(
        target, processor, conversations, folder / output, max_length=300, samples_per_shard=2, batch_size=2
    )


def regenerate_answers(shared: Path, folder: Path, again: bool) -> None:
    target, processor = load_target_and_processor(shared / "target")
    conversations = load_conversations(ToySamples("train", 10, 0, "visual"))  # its pictures become files
    regenerate(target, processor, conversations, folder / "out.jsonl", max_new_tokens=4, batch_size=2, temperature=1.0)


def convert(shared: Path, folder: Path, again: bool) -> None:
    os.chdir(folder)
    sys.argv = ["msd-hf", "convert", str(shared / "new-draft"), "out", "--overwrite"]
    cli.app(standalone_mode=False)


JOBS: dict[str, Job] = {
    "train": train,
    "train, 1 checkpoint kept": lambda *place: train(*place, save_total_limit=1),
    "train, no checkpoints": lambda *place: train(*place, save_strategy="no", max_steps=3),
    "train, cached features": lambda *place: train(*place, cached=True, save_steps=1, save_total_limit=2),
    "train, best of evaluations": train_with_evaluation,
    "train, answers of the target": lambda *place: train(
        *place, target_written_answers=True, answer_max_new_tokens=3, max_steps=2, save_steps=1
    ),
    "extract": extract,
    "regenerate": regenerate_answers,
    OVERWRITE: convert,
}


def write_inputs(shared: Path) -> None:
    processor = AutoProcessor.from_pretrained(TARGET_DIR)
    config = build_target_config(processor, num_layers=2)
    config.text_config.hidden_size = config.text_config.intermediate_size = 32
    config.text_config.head_dim = 8
    config.vision_config.num_hidden_layers = 1
    set_seed(0)
    target = LlavaForConditionalGeneration(config)
    target.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    target.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    target.save_pretrained(shared / "target")
    processor.save_pretrained(shared / "target")
    write_training_data(shared / "data", 20, seed=0)
    for name in ("old-draft", "new-draft"):
        MSDDraftModel.from_target(target).save_pretrained(shared / name)
    for kind in ("text", "visual"):
        extract(shared, shared, False, kind, f"features/{kind}")


# How it is killed


class KillPoint:
    """
    Counts the file operations of this process below `folder`, and ends it at one of them as a kill would: at once.

    Args:
        folder: operations on other files do not count.
        number: number of the operation, from 1; `None` never kills.
    """

    def __init__(self, folder: Path, number: int | None):
        self.folder, self.number, self.count = str(folder), number, 0

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync, save, serialize = os.fsync, torch.save, safetensors.torch.serialize_file
        opened = builtins.open

        def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            result = opened(file, mode, *args, **kwargs)
            writes = isinstance(file, (str, os.PathLike)) and any(letter in mode for letter in "wax+")
            return _HalfWritten(result) if writes and self._is_time(file) else result

        def flush(file: Any) -> None:
            self._count(self.folder)
            fsync(file)

        def save_object(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(value, file, *args, **kwargs)
            self._cut(file)

        def serialize_tensors(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            serialize(tensors, file, *args, **kwargs)
            self._cut(file)

        builtins.open = io.open = open_file
        os.fsync, torch.save, safetensors.torch.serialize_file = flush, save_object, serialize_tensors

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in _PATH_EVENTS:
            self._count(args[0])

    def _is_time(self, path: Any) -> bool:
        if not (isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.folder)):
            return False
        self.count += 1
        return self.count == self.number

    def _count(self, path: Any) -> None:
        if self._is_time(path):
            os._exit(KILLED)

    def _cut(self, path: Any) -> None:
        if self._is_time(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os._exit(KILLED)


class _HalfWritten:
    """A file to which only half of the first write comes."""

    def __init__(self, file: Any):
        self.file = file

    def write(self, content: Any) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os._exit(KILLED)

    def __enter__(self) -> _HalfWritten:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def run(job: Callable[[], None], folder: Path, operation: int | None = None, after: float | None = None) -> Any:
    """
    Runs a job in a process of its own, which has all imports already.

    Args:
        operation: number of the file operation at which it is killed.
        after: seconds after which it is killed.

    Returns:
        `None` if it was killed, else the number of its file operations.

    Raises:
        RuntimeError: when the job fails.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        _run_here(job, KillPoint(folder, operation), writing)
    os.close(writing)
    if not select.select([reading], [], [], after)[0]:
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        report = pipe.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == KILLED:
        return None
    if os.WEXITSTATUS(status):
        raise RuntimeError(report)
    return int(report)


def _run_here(job: Callable[[], None], point: KillPoint, writing: int) -> None:
    status, report = 1, ""
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        point.install()
        job()
        status, report = 0, str(point.count)
    except BaseException:
        report = traceback.format_exc()
    finally:
        os.write(writing, report.encode()[-60_000:])
        os._exit(status)


# What must hold


def content(folder: Path) -> dict[str, str]:
    """A hash of each file of the job, and of what is stable in files that hold times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in _FOREIGN:
            continue
        data: Any = path.read_bytes()
        if path.name in _UNSTABLE:
            data = _stable(path, json.loads(data)) if path.suffix == ".json" else b""
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _stable(path: Path, values: dict[str, Any]) -> bytes:
    if path.name == "training_provenance.json":
        kept = {name: values[name] for name in ("step", "max_steps", "finished", "fingerprint", "data", "recipe")}
    else:
        logs = [entry for entry in values["log_history"] if "loss" in entry]
        kept = {"step": values["global_step"], "best": values["best_global_step"], "logs": logs}
    return json.dumps(kept, sort_keys=True).encode()


def write_foreign(folder: Path) -> None:
    for name, text in _FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def has_foreign(folder: Path) -> bool:
    return all((folder / name).is_file() and (folder / name).read_text() == text for name, text in _FOREIGN.items())


class Study:
    """Kills jobs and counts what became of them. `counts` and `problems` are those of all cases."""

    def __init__(self, work: Path, seed: int, names: list[str]):
        self.work, self.seed, self.names = work, seed, names
        self.shared = work / "shared"
        self.ends: dict[str, dict[str, str]] = {}
        self.operations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in names}
        self.problems: list[str] = []
        self.num_cases = 0

    def prepare(self) -> None:
        run(lambda: write_inputs(self.shared), self.shared)
        for number, name in enumerate(self.names):
            folder = self.work / f"whole-{number}"
            write_foreign(folder)
            start = time.monotonic()
            self.operations[name] = run(
                lambda name=name, folder=folder: JOBS[name](self.shared, folder, False), folder
            )
            self.seconds[name] = time.monotonic() - start
            self.ends[name] = content(folder)

    def _new_folder(self, folder: str, name: str) -> Path:
        write_foreign(self.work / folder)
        if name == OVERWRITE:
            shutil.copytree(self.shared / "old-draft", self.work / folder / "out")
        return self.work / folder

    def add(self, outcome: dict[str, Any]) -> None:
        """Counts the outcome of the next case."""
        self.counts[outcome["job"]].update(outcome["counts"])
        self.problems += outcome["problems"]
        self.num_cases += 1

    def case(self, number: int) -> dict[str, Any]:
        """Kills one job once or more, lets it end, and compares. Returns its name, its counts and what is wrong."""
        name = self.names[number % len(self.names)]
        rng, counts = random.Random(f"{self.seed}/{number}"), Counter(cases=1)
        folder = self._new_folder(f"case-{number}", name)
        problems: list[tuple[str, str]] = []
        try:
            again = False
            for _ in range(rng.choice((1, 1, 2, 3))):
                at_time = rng.random() < 0.3
                place: dict[str, Any] = {"operation": rng.randint(1, self.operations[name])}
                if at_time:
                    place = {"after": rng.uniform(0, self.seconds[name])}
                done = run(partial(JOBS[name], self.shared, folder, again), folder, **place) is not None
                again = True
                if not has_foreign(folder):
                    problems.append(("lost", f"a file of the user, after {place}"))
                if done:
                    break
                counts["at a time" if at_time else "at a file"] += 1
            if not done:
                run(partial(JOBS[name], self.shared, folder, True), folder)
        except RuntimeError as error:
            problems.append(("failed", str(error)))
        problems += self._compare(name, folder)
        shutil.rmtree(folder)
        counts.update(kind for kind, _ in problems)
        found = [f"case {number} ({name}): {kind}: {detail}" for kind, detail in problems]
        return {"case": number, "job": name, "counts": counts, "problems": found}

    def _compare(self, name: str, folder: Path) -> list[tuple[str, str]]:
        end, found = self.ends[name], content(folder)
        different = sorted(path for path in end.keys() & found.keys() if end[path] != found[path])
        empty = [
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())
        ]
        groups = {
            "missing": sorted(end.keys() - found.keys()),
            "different": different,
            "left over": [*sorted(found.keys() - end.keys()), *empty],
            "lost": [] if has_foreign(folder) else ["a file of the user"],
        }
        return [(kind, ", ".join(paths)) for kind, paths in groups.items() if paths]

    @property
    def num_kills(self) -> int:
        return sum(counts["at a time"] + counts["at a file"] for counts in self.counts.values())

    def table(self) -> str:
        columns = ("cases", "at a file", "at a time", "different", "missing", "left over", "lost", "failed")
        rows = [("job", "file operations", *columns)]
        rows += [
            (name, str(self.operations[name]), *(str(counts[column]) for column in columns))
            for name, counts in self.counts.items()
        ]
        total = sum(self.counts.values(), Counter())
        rows.append(("all", "", *(str(total[column]) for column in columns)))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def study(kills: int, seed: int, only: list[str] | None, results: Path | None) -> Study:
    """Runs cases until `kills` kills are made. `only` has parts of the names of the jobs."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        names = [name for name in JOBS if any(part in name for part in only or [""])]
        study = Study(Path(work).resolve(), seed, names)
        study.prepare()
        if results is not None and results.exists():
            for line in results.read_text().splitlines():
                study.add(json.loads(line))
        while study.num_kills < kills:
            outcome = study.case(study.num_cases)
            study.add(outcome)
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(outcome) + "\n")
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a part of the name of a job; may be repeated")
    parser.add_argument("--results", type=Path, help="a file for the outcomes; an interrupted study goes on there")
    arguments = parser.parse_args()
    start = time.monotonic()
    result = study(arguments.kills, arguments.seed, arguments.only, arguments.results)
    print(result.table())
    print(f"\n{result.num_kills} kills in {time.monotonic() - start:.0f} s, {len(result.problems)} problems")
    for problem in result.problems:
        print(problem)
    sys.exit(bool(result.problems))


if __name__ == "__main__":
    main()
