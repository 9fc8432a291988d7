"""
Random command lines over all commands, with odd values and odd files. No traceback, no hang, no gigabyte; an exit
status of 0, 1, 2 or 130, and exactly one line `Error: ...` unless it is 0.

    python examples/studies/fuzz_commands.py --cases 250 --seed 0
    python examples/studies/fuzz_commands.py --case 17 --seed 0  # one case, with what it prints

A case follows from the seed and its number. The exit status is 1 if any case failed. Needs Linux.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz_runs import Outcome, run_forked
from PIL import Image

from msd_hf import cli, evaluation, training
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR


IMPORTED = (evaluation, training)  # before the forks, so that a case need not import them

ESCAPE = "\x1b[31mred"
ODD = ["", " ", "0", "-1", "nan", "inf", "x", "[/b]", "[bold]x[/bold]", ESCAPE, "\udcff", "٣", "1_0", "True", "--help"]
NUMBERS = [*ODD, "-3", "1e400", "1e-320", "0.5", "99999999999999999999", "-9223372036854775809"]
HUGE = [*NUMBERS, "1000000000"]  # for options whose large values mean no longer work
DTYPES = [*ODD, "float8_e4m3fn", "float3", "int8", "complex64", "float16", "dtype", "nn"]
DEVICES = [*ODD, "meta", "cuda", "cuda:99", "mps", "cpu:7", "xla", "privateuseone", "toaster"]
TRAINING_NUMBERS = """
    per-device-train-batch-size per-device-eval-batch-size gradient-accumulation-steps learning-rate warmup-steps
    weight-decay max-grad-norm seed data-seed noise unroll-passes unroll-decay logging-steps save-steps eval-steps
    max-length head-chunk-size eval-prompts curriculum-stages text-fraction tree-depth tree-top-k num-assistant-tokens
    early-stopping-patience answer-batch-size eval-samples adam-beta2 dataloader-num-workers save-total-limit
"""
TEXTS = [*ODD, "<image>", "</s>", "a" * 20000, "\u202eabc", "é😀"]
STATUSES = (0, 1, 2, 130)


@dataclass
class Command:
    """
    A command that works, and values to replace.

    Args:
        words (`list[str]`): its name and its positional arguments. `{name}` is a file of the world.
        options (`dict[str, str]`): options that make it work, quickly.
        odd (`dict[str, list[str]]`): odd values by option; "" stands for the positional arguments.
    """

    words: list[str]
    options: dict[str, str]
    odd: dict[str, list[str]] = field(default_factory=dict)


def targets(folder: Path) -> list[str]:
    """Writes broken targets. Returns their paths, and names of targets that are nowhere."""
    whole = folder / "target"
    shutil.copytree(TARGET_DIR, whole)

    def broken(name: str, file: str, content: bytes | None) -> str:
        path = folder / name
        shutil.copytree(whole, path)
        if content is None:
            (path / file).unlink()
        else:
            (path / file).write_bytes(content)
        return str(path)

    config = json.loads((whole / "config.json").read_text())
    wide = json.loads(json.dumps(config))
    wide["text_config"]["hidden_size"] *= 2
    weights = (whole / "model.safetensors").read_bytes()
    template = "chat_template.jinja"
    made = [
        broken("cut weights", "model.safetensors", weights[: len(weights) // 2]),
        broken("empty weights", "model.safetensors", b""),
        broken("no weights", "model.safetensors", None),
        broken("wide", "config.json", json.dumps(wide).encode()),
        broken("list", "config.json", b"[]"),
        broken("latin", "config.json", b'{"a": "\xff"}'),
        broken("no kind", "config.json", b"{}"),
        broken("odd kind", "config.json", json.dumps({**config, "model_type": "[/b]" + ESCAPE}).encode()),
        broken("text kind", "config.json", b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'),
        broken(
            "own code",
            "config.json",
            json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}).encode(),
        ),
        broken("null", "config.json", json.dumps({**config, "text_config": None}).encode()),
        broken("broken template", template, b"{% for message in messages %}"),
        broken("failing template", template, b"{{ 1 / 0 }}"),
        broken("odd template", template, b"{{ messages[0].content + 1 }}"),
        broken("short template", template, b"hello"),
        broken("cut tokenizer", "tokenizer.json", (whole / "tokenizer.json").read_bytes()[:2000]),
        broken("no tokenizer", "tokenizer.json", None),
        broken("processor", "processor_config.json", b'{"processor_class": "NoProcessor"}'),
        broken("qwen processor", "processor_config.json", b'{"processor_class": "Qwen2VLProcessor"}'),
    ]
    (folder / "a file").write_text("{}")
    (folder / "empty folder").mkdir()
    made += [str(folder / "a file"), str(folder / "empty folder"), str(folder / "nowhere"), str(DRAFT_DIR)]
    return [*made, *ODD, "no/such-model", "a/b/c", "/dev/null", "https://example.org/x"]


def images(folder: Path) -> list[str]:
    """Writes odd pictures. Returns their paths."""
    picture = Image.open(DEMO_IMAGE).convert("RGB")
    names = {name: folder / name for name in ("deep.png", "float.tiff", "bomb.png", "thin.png", "[/b].png", "dot.png")}
    for path in names.values():
        path.parent.mkdir(exist_ok=True)
    Image.new("I;16", (40, 30), 40000).save(names["deep.png"])
    Image.new("F", (40, 30), 4e9).save(names["float.tiff"])
    Image.new("1", (20000, 20000)).save(names["bomb.png"])
    picture.resize((4000, 2)).save(names["thin.png"])
    picture.save(names["[/b].png"])
    picture.resize((1, 1)).save(names["dot.png"])
    content = Path(DEMO_IMAGE).read_bytes()
    more = {
        "cut.png": content[: len(content) // 2],
        "text.png": b"text",
        "empty.png": b"",
        "chunk.png": content.replace(b"IDAT", b"I\0\0T"),
    }
    for name, data in more.items():
        (folder / name).write_bytes(data)
    odd_name = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    shutil.copy(DEMO_IMAGE, odd_name)
    written = [*map(str, names.values()), *(str(folder / name) for name in more), odd_name]
    return [*written, *ODD, str(folder), "/dev/zero", "a" * 5000 + ".png"]


def data_files(folder: Path) -> list[str]:
    """Writes odd data. Returns the paths."""
    turns = [{"from": "human", "value": "What is there?"}, {"from": "gpt", "value": "A red circle."}]
    good = [{"id": str(number), "conversations": turns} for number in range(6)]
    text = "".join(json.dumps(sample) + "\n" for sample in good)
    (folder / "good.jsonl").write_text(text)
    picture = {
        "id": "p",
        "image": "picture.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, turns[1]],
    }
    shutil.copy(DEMO_IMAGE, folder / "picture.png")
    (folder / "pictures.json").write_text(json.dumps([picture] * 4))
    odd_id = {"id": f"[/b]{ESCAPE}", "conversations": [{"from": ESCAPE, "value": "a"}, turns[1]]}
    files = {
        "line.jsonl": (text + '{"id": \n').encode(),
        "number.jsonl": (text + "3\n").encode(),
        "latin.jsonl": text.encode() + b'{"id": "\xff"}\n',
        "latin.json": b'[{"id": "\xff"}]',
        "empty.jsonl": b"",
        "empty.json": b"",
        "none.json": b"[]",
        "object.json": b'{"a": 1}',
        "deep.json": b"[" * 100000,
        "long number.json": b"[" + b"1" * 10000 + b"]",
        "broken.jsonl": b"{}\n" * 5,
        "odd.jsonl": (json.dumps(odd_id) + "\n" + text).encode(),
        "odd alone.jsonl": (json.dumps(odd_id) + "\n").encode() * 3,
        f"[/b]{ESCAPE}.jsonl": text.encode(),
        "special.jsonl": text.replace("What", "</s>").encode(),
        "images.json": json.dumps([{**picture, "image": {"bytes": "text"}}, picture, *good]).encode(),
        "zero.jsonl": b"\0" * 1000,
        "lines.txt": text.encode(),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return [*(str(folder / name) for name in files), *ODD, str(folder), "/dev/zero", "/dev/null", "nowhere.json"]


def build_world(folder: Path) -> dict[str, Command]:
    """Writes all files. Returns the commands by name."""
    broken_targets, pictures, data = targets(folder), images(folder), data_files(folder)
    drafts = [*ODD, str(TARGET_DIR), str(folder / "a file"), str(folder / "empty folder"), "no/such-draft"]
    outputs = [*ODD, ".", "out", str(folder / "a file"), "/proc/nothing", "/dev/null/x", "a" * 300, "/dev/full"]
    good, visual, target = str(folder / "good.jsonl"), str(folder / "pictures.json"), str(folder / "target")
    pair = {"--target": target, "--draft": str(DRAFT_DIR)}
    answer = {"--max-new-tokens": HUGE, "--temperature": NUMBERS, "--seed": HUGE, "--repeats": ODD}
    where = {"--dtype": DTYPES, "--device": DEVICES}
    pairs = {"--target": broken_targets, "--draft": drafts}
    reading = {"--target": broken_targets, "--image-folder": [*ODD, str(folder / "a file"), "/dev/null"]}
    writing = {"--output": outputs, "--strict": [""]}
    configs = {
        "bytes": b"max_steps: \xff\n",
        "list": b"max_steps: [1]\n",
        "text": b"learning_rate: abc\nseed: [/b]\n",
        "null": b"output_dir:\nmax_steps:\n",
        "numbers": b"target: 3\ntext_data: 4\n",
        "mapping": b"draft: {a: 1}\n",
        "deep": b"a: " + b"[" * 5000,
        "unknown": b"no_such: 1\n",
    }
    for name, content in configs.items():
        (folder / f"{name}.yaml").write_bytes(content)
    train_odd = {
        "--target": broken_targets,
        "--text-data": data,
        "--draft": drafts,
        "--output-dir": outputs,
        "--config": [*ODD, *(str(folder / f"{name}.yaml") for name in configs), good, str(folder), "/dev/null"],
        "--target-dtype": DTYPES,
        "--resume-from-checkpoint": [*ODD, str(folder)],
        "--eval-data": data,
        "--strict": ODD,
        "--recipe": ODD,
        "--target-layers": [*ODD, "99", "1,x", "-5"],
        "--report-to": [*ODD, "tensorboard", "wandb"],
        "--lr-scheduler-type": ODD,
        "--optim": [*ODD, "adafactor", "adamw_bnb_8bit"],
        "--curriculum": ODD,
        "--attn-implementation": [*ODD, "flash_attention_2"],
    }
    for name in TRAINING_NUMBERS.split():
        train_odd[f"--{name}"] = NUMBERS
    train_odd["--per-device-train-batch-size"] = HUGE
    train_odd["--max-length"] = train_odd["--head-chunk-size"] = train_odd["--eval-prompts"] = HUGE
    # A large number of steps is a long run, not a mistake.
    train_odd["--max-steps"] = train_odd["--num-train-epochs"] = [*ODD, "-3", "1e400", "1e-320", "0.5"]
    training = {
        "--target": target,
        "--text-data": good,
        "--curriculum": "text",
        "--max-steps": "1",
        "--use-cpu": "true",
    }
    training |= {
        "--per-device-train-batch-size": "2",
        "--report-to": "none",
        "--output-dir": "out",
        "--logging-steps": "1",
    }
    bench = {"--num-prompts": "1", "--repeats": "1", "--max-new-tokens": "6"}
    bench_odd = {**answer, **where, "--num-prompts": ODD, "--min-answer-tokens": HUGE, "--baseline": [*ODD, "chain"]}
    shapes = {
        "--nodes": [*ODD, "1,x", ",", "-1"],
        "--assume-tau": [*NUMBERS, "1,,", "0"],
        "--context": ODD,
        "--shape": ODD,
    }
    odd = {"": [*ODD, str(folder), str(folder / "a file"), str(TARGET_DIR)]}
    quick = {"--repeats": "1", "--max-new-tokens": "6"}
    return {
        "demo": Command(["demo"], quick, {**answer, "--image": pictures, "--prompt": TEXTS}),
        "generate": Command(
            ["generate"],
            {**pair, **quick, "--prompt": "What is there?", "--image": str(DEMO_IMAGE)},
            {**answer, **where, **pairs, "--image": pictures, "--prompt": TEXTS, "--text-only": [""]},
        ),
        "bench": Command(["bench"], {**pair, **bench, "--data": good}, {**bench_odd, **pairs, "--data": data}),
        "bench --toy": Command(
            ["bench", "--toy"], bench, {**bench_odd, **shapes, "--output": outputs, "--plots": [""]}
        ),
        "bench --shape": Command(["bench"], {"--shape": "llava-9b"}, {**shapes, **where, "--draft-vocab-size": HUGE}),
        "convert": Command(["convert", str(DRAFT_DIR), "out"], {}, {**odd, "--overwrite": [""]}),
        "extract": Command(
            ["extract"],
            {"--target": target, "--data": good, "--output": "out"},
            {
                **reading,
                **writing,
                **where,
                "--data": data,
                "--max-length": HUGE,
                "--storage": DTYPES,
                "--batch-size": HUGE,
                "--target-layers": [*ODD, "99", "1,x", "auto"],
                "--num-workers": ODD,
            },
        ),
        "regenerate": Command(
            ["regenerate"],
            {"--target": target, "--data": good, "--output": "out.jsonl", "--max-new-tokens": "6"},
            {
                **reading,
                **writing,
                **where,
                **answer,
                "--data": data,
                "--batch-size": HUGE,
                "--output": [f"{path}.jsonl" for path in outputs],
            },
        ),
        "draft-vocab": Command(
            ["draft-vocab"],
            {**pair, "--data": good, "--output": "out", "--size": "40"},
            {**pairs, **reading, "--output": outputs, "--data": data, "--size": HUGE, "--overwrite": [""]},
        ),
        "tune": Command(
            ["tune"],
            {**pair, "--data": good, "--output": "out", "--num-prompts": "1", "--max-new-tokens": "4"},
            {**pairs, **reading, **where, "--output": outputs, "--data": data, "--num-prompts": HUGE},
        ),
        "data check": Command(
            ["data", "check"],
            {"--target": target, "--data": visual},
            {**reading, "--data": data, "--max-length": HUGE, "--show": HUGE, "--strict": [""]},
        ),
        "train": Command(["train"], training, train_odd),
    }


def draw(commands: dict[str, Command], seed: int, number: int) -> tuple[str, list[str]]:
    """The command line of a case, and the name of its command."""
    rng = random.Random(f"{seed} {number}")
    weights = [3 if name in ("train", "generate") else 1 for name in commands]
    name = rng.choices(list(commands), weights)[0]
    command = commands[name]
    words, options = list(command.words), dict(command.options)
    for _ in range(rng.choice([1, 1, 1, 2])):
        option = rng.choice(list(command.odd))
        value = rng.choice(command.odd[option])
        if option:
            options[option] = value
        else:
            words[rng.randrange(1, len(words))] = value
    if rng.random() < 0.05 and options:
        del options[rng.choice(list(options))]
    if rng.random() < 0.04:
        options[rng.choice(["--no-such-option", f"--{ESCAPE}", "--[/b]", "-x"])] = "1"
    for option, value in options.items():
        words += [option] if value == "" and rng.random() < 0.5 else [option, value]
    return name, [word for word in words if "\0" not in word]


def run_case(line: list[str]) -> Outcome:
    """Runs a command line in a folder of its own, two levels deep, so that `..` is its own too."""
    with tempfile.TemporaryDirectory(prefix="fuzz-case-") as folder:

        def case() -> None:
            place = Path(tempfile.mkdtemp(dir=folder), "outer", "inner")
            place.mkdir(parents=True)
            os.chdir(place)
            sys.argv = ["msd-hf", *line]
            cli.main()

        return run_forked(case)


def problems_of(outcome: Outcome) -> list[str]:
    """What is wrong with the end of a command."""
    found = outcome.problems()
    if outcome.status is not None and outcome.status not in STATUSES:
        found.append(f"status {outcome.status}")
    num_lines = sum(line.startswith("Error: ") for line in outcome.errors.splitlines())
    if outcome.status in (1, 2) and num_lines != 1:
        found.append(f"{num_lines} error lines")
    if ESCAPE in outcome.output + outcome.errors:
        found.append("control characters")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="Run one case and show what it prints.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as folder:
        commands = build_world(Path(folder))
        numbers = range(args.cases) if args.case is None else [args.case]
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        failed = 0
        slowest = most = 0.0
        for number in numbers:
            name, line = draw(commands, args.seed, number)
            outcome = run_case(line)
            found = problems_of(outcome)
            counts[name][f"status {outcome.status}"] += 1
            slowest, most = max(slowest, outcome.seconds), max(most, outcome.num_bytes)
            if found:
                failed += 1
                counts[name]["failed"] += 1
                counts["all"].update(found)
            if found or args.case is not None:
                last = (outcome.errors.strip().splitlines() or [""])[-1]
                print(f"{number}: {', '.join(found)}: {ascii(line)[:600]}\n    {ascii(last)[:300]}", flush=True)
            if args.case is not None:
                print(ascii(outcome.output), ascii(outcome.errors), sep="\n")
        for name, count in counts.items():
            print(f"{name:14} " + ", ".join(f"{what} {number}" for what, number in sorted(count.items())))
        print(f"{failed} of {len(numbers)} failed; slowest {slowest:.1f} s, most memory {most / 1e6:.0f} MB")
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
