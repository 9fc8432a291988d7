"""
The effect of each part of the training: a table, a JSON file and a plot for each study.

    python examples/studies/ablation.py --study paper     # {decoupled, not} x {text, visual, mixed, two-stage}
    python examples/studies/ablation.py --study recipes   # the paper's, each addition to it, and the recommended one
    python examples/studies/ablation.py --study options   # the recommended one, and each option that is off in it
    python examples/studies/ablation.py --study kinds     # MSD and EAGLE-3, with images decoupled and not

`--world` chooses pictures of 36 (`toy`), 576 (`large`) or 2,304 visual tokens (`gallery`). Every draft is trained on
cached features of the same conversations, with the same optimizer, for as many steps, tokens or seconds, and
measured on held-out prompts: tau, with 95% intervals by a bootstrap over prompts and seeds, and the contrasts of the
paper. The output folder keeps finished parts, so that a stopped run resumes. Needs `pip install -e ".[bench]"`.
"""

import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy
import torch
from ablation_worlds import WORLDS, World
from bootstrap import Interval, difference, tau_interval
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser, TrainerCallback
from transformers.utils import logging

from msd_hf import AutoDraft, MSDDraftModel
from msd_hf.evaluation import METHODS, Comparison, compare, timed_generate
from msd_hf.loading import load_target_and_processor
from msd_hf.training import (
    FeatureCache,
    MSDTrainer,
    MSDTrainingArguments,
    extract_features,
    load_conversations,
    regenerate,
)
from msd_hf.training.new_draft import new_draft


KINDS = ("text", "visual")
CURRICULA = ("text", "visual", "mixed", "two-stage")
TREE_METHOD = METHODS["tree"]
# A fixed tree, so that tau does not depend on what a machine finds to pay.
TREE_SETTINGS = {"num_assistant_tokens": 24, "tree_depth": 6, "tree_top_k": 4}
# The same for all runs. A draft of 0.2M parameters takes larger and fewer steps than the draft of a 7B model.
OPTIMIZER = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine"}
MAX_LENGTH = 4096  # tokens of a conversation
EAGLE3 = {"draft_kind": "eagle3"}
# All by the recommended recipe of their kind. An EAGLE-3 draft has more parameters than an MSD draft of one layer, and
# in the toy world about as many as one of two layers.
KIND_RUNS: dict[str, dict[str, Any]] = {
    "MSD, decoupled": {},
    "MSD, not decoupled": {"decouple_visual_tokens": False},
    "MSD, decoupled, two layers": {"draft_layers": 2},
    "EAGLE-3, decoupled": {**EAGLE3, "visual_positions": "decoupled"},
    "EAGLE-3, not decoupled": {**EAGLE3, "visual_positions": "image_embedding"},
    "EAGLE-3, placeholder": {**EAGLE3, "visual_positions": "placeholder"},
}
ORIGINAL_LAYER, OUR_LAYER = "original layer", "input norm"


@dataclass
class AblationArguments:
    study: str = field(
        default="paper",
        metadata={"choices": ["paper", "recipes", "options", "kinds"], "help": "Which drafts are trained."},
    )
    world: str = field(
        default="toy", metadata={"choices": list(WORLDS), "help": "What they are trained and asked on."}
    )
    output: str = field(default="ablation", metadata={"help": "Folder for features, drafts and results."})
    steps: int | None = field(default=None, metadata={"help": "Training steps of each draft. Default: the world's."})
    equal: str = field(
        default="steps",
        metadata={
            "choices": ["steps", "tokens", "time"],
            "help": "What all drafts get: as many steps, as many tokens as --steps of the mixed ones have, or as much "
            "processor time as --steps of the first draft take.",
        },
    )
    layer: str = field(
        default=ORIGINAL_LAYER,
        metadata={"choices": [ORIGINAL_LAYER, OUR_LAYER], "help": "The draft's layer: without or with an input norm."},
    )
    samples: int = field(default=1024, metadata={"help": "Training conversations of each kind."})
    seeds: int = field(default=2, metadata={"help": "Drafts with different seeds for each row of the table."})
    prompts_per_kind: int = field(default=2, metadata={"help": "Held-out questions of each kind."})
    speedup: bool = field(
        default=True, metadata={"help": "Measure speedup too, which needs an otherwise idle machine; else tau alone."}
    )
    workers: int = field(default=2, metadata={"help": "Drafts that are trained at the same time, on one thread each."})


# Each is off in the recommended recipe.
OPTIONS: dict[str, dict[str, Any]] = {
    "accepted length": {"accepted_length_loss_weight": 0.3},
    "hard labels": {"label_temperature": 0.0},
    "hard examples": {"hard_example_mixing": 0.3},
    "5 passes at the end": {"final_unroll_passes": 5},
    "two layers": {"draft_layers": 2},
    "global vector": {"global_image_vector": True},
}
TIMED_STEPS = 12  # of the short training that tells how long a step takes


@dataclass(frozen=True)
class Run:
    """
    The training of one draft.

    Args:
        name: name in the table.
        seed: seed of the training.
        steps: training steps.
        batch_size: conversations of a step.
        answers: `"data"` or `"target"`: who wrote the answers.
        storage: number format of the feature cache.
        has_input_norm: whether the draft's layer normalises its input; `None`: as the arguments say.
        arguments: training arguments that differ from the paper's.
    """

    name: str
    seed: int
    steps: int
    batch_size: int
    answers: str = "data"
    storage: str = "float16"
    has_input_norm: bool | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def folder(self, output: Path) -> Path:
        """The folder of the draft."""
        norm = "" if self.has_input_norm is None else f"-norm{int(self.has_input_norm)}"
        name = self.name.replace(", ", "-").replace(" ", "_")
        return output / "drafts" / f"{name}{norm}-{self.steps}-seed{self.seed}"


def list_runs(args: AblationArguments, output: Path) -> list[Run]:
    world = WORLDS[args.world]
    steps = args.steps or world.steps
    runs = []
    for seed in range(args.seeds):
        if args.study == "paper":
            norm = args.layer == OUR_LAYER
            for decoupled in (True, False):
                for curriculum in CURRICULA:
                    name = f"{'decoupled' if decoupled else 'not decoupled'}, {curriculum}"
                    arguments = {"decouple_visual_tokens": decoupled, "curriculum": curriculum}
                    own_steps = steps if args.equal == "steps" else equal_tokens(steps, curriculum, output)
                    runs.append(Run(name, seed, own_steps, world.batch_size, has_input_norm=norm, arguments=arguments))
        elif args.study == "options":
            shared = {"recipe": "recommended"}
            size = {"steps": steps, "batch_size": world.batch_size}
            runs.append(Run("recommended", seed, **size, arguments=shared))
            runs.append(Run("target-written answers", seed, **size, answers="target", arguments=shared))
            runs += [Run(name, seed, **size, arguments={**shared, **more}) for name, more in OPTIONS.items()]
        elif args.study == "kinds":
            size = {"steps": steps, "batch_size": world.batch_size}
            for name, arguments in KIND_RUNS.items():
                runs.append(Run(name, seed, **size, arguments={"recipe": "recommended", **arguments}))
        else:
            additions = {
                "start from the last layer": {"init_from_last_layer": True},
                "drafted rows, no noise": {"trained_rows": "drafted", "noise": 0.0},
                "unrolled training": {"unroll_passes": 3},
                "several layers": {"target_layers": "auto"},
            }
            size = {"steps": steps, "batch_size": world.batch_size}
            runs.append(Run("paper", seed, **size))
            runs.append(Run("paper + target-written answers", seed, **size, answers="target"))
            runs += [Run(f"paper + {name}", seed, **size, arguments=more) for name, more in additions.items()]
            runs.append(Run("paper, features in 8 bits", seed, **size, storage="int8"))
            runs.append(Run("recommended", seed, **size, arguments={"recipe": "recommended"}))
    return runs


def equal_time(runs: list[Run], world: str, output: Path) -> list[Run]:
    """The runs with as many steps as take the processor time of the first one. A short training, whose result is
    kept, tells how long a step of each kind takes."""
    path = output / "seconds_of_a_step.json"
    seconds = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for run in runs:
        if run.name not in seconds:
            with TemporaryDirectory() as folder:
                timer = StepTimer()
                make_trainer(replace(run, steps=TIMED_STEPS), world, output, Path(folder), [timer]).train()
            seconds[run.name] = statistics.median(timer.seconds[2:])
            path.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    return [replace(run, steps=round(run.steps * seconds[runs[0].name] / seconds[run.name])) for run in runs]


class StepTimer(TrainerCallback):
    """Keeps the processor time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def equal_tokens(steps: int, curriculum: str, output: Path) -> int:
    """As many steps as give a curriculum the tokens that `steps` of mixed samples have. Two stages and mixed samples
    have half of both kinds."""
    lengths = {}
    for kind in KINDS:
        cache = FeatureCache(output / Cache(kind, "data", "float16", ()).folder)
        lengths[kind] = cache.index.num_tokens / len(cache)
    mean = sum(lengths.values()) / len(lengths)
    return round(steps * mean / lengths.get(curriculum, mean))


def make_arguments(run: Run, folder: Path) -> MSDTrainingArguments:
    return MSDTrainingArguments(
        output_dir=str(folder),
        max_steps=run.steps,
        warmup_steps=run.steps // 20,
        per_device_train_batch_size=run.batch_size,
        seed=run.seed,
        save_strategy="no",
        max_length=MAX_LENGTH,
        report_to="none",
        disable_tqdm=True,
        logging_steps=50,
        **{**OPTIMIZER, **run.arguments},
    )


def write_answers(job: tuple[str, str, Path, int]) -> None:
    """Lets the target answer the questions of one kind of conversation."""
    kind, world_name, output, num_samples = job
    path = answers_path(output, kind)
    if path.is_file():
        return
    torch.set_num_threads(1)
    world = WORLDS[world_name]
    target, processor = load_target_and_processor(world.target)
    path.parent.mkdir(parents=True, exist_ok=True)
    conversations = load_conversations(world.samples(kind, num_samples))
    regenerate(target, processor, conversations, path, max_new_tokens=160, batch_size=2 * world.forward_batch_size)


def answers_path(output: Path, kind: str) -> Path:
    return output / "answers" / f"{kind}.jsonl"


def extract(job: tuple["Cache", str, Path, int]) -> None:
    """Extracts the features of one kind of conversation, with the answers of the data or of the target."""
    cache, world_name, output, num_samples = job
    torch.set_num_threads(1)
    world = WORLDS[world_name]
    target, processor = load_target_and_processor(world.target)
    written = cache.answers == "target"
    data = answers_path(output, cache.kind) if written else world.samples(cache.kind, num_samples)
    extract_features(
        target,
        processor,
        load_conversations(data),
        output / cache.folder,
        storage=cache.storage,
        batch_size=world.forward_batch_size,
        feature_layers=list(cache.layers) or None,
        all_hidden_states=True,
        max_length=MAX_LENGTH,
    )


class Cache(NamedTuple):
    """A feature cache for the training of some of the drafts."""

    kind: str
    answers: str
    storage: str
    layers: tuple[int, ...]

    @property
    def folder(self) -> str:
        return "-".join(["features/" + self.kind, self.answers, self.storage, *map(str, self.layers)])


def needed_caches(run: Run, world: World, output: Path) -> dict[str, Cache]:
    num_layers = AutoConfig.from_pretrained(world.target).text_config.num_hidden_layers
    layers = tuple(make_arguments(run, output).layers_of(num_layers) or ())
    return {kind: Cache(kind, run.answers, run.storage, layers) for kind in KINDS}


def train(job: tuple[Run, str, Path]) -> None:
    """Trains one draft, unless it exists."""
    run, world_name, output = job
    folder = run.folder(output)
    if (folder / "training_provenance.json").is_file():
        return
    trainer = make_trainer(run, world_name, output, folder)
    trainer.train()
    for name, value in TREE_SETTINGS.items():
        setattr(trainer.model.generation_config, name, value)
    trainer.model.generation_config.max_visual_rows = None  # the study is about what the draft makes of them
    trainer.save_model()


def make_trainer(
    run: Run, world_name: str, output: Path, folder: Path, callbacks: list[TrainerCallback] | None = None
) -> MSDTrainer:
    torch.set_num_threads(1)
    world = WORLDS[world_name]
    target, processor = load_target_and_processor(world.target)
    caches = {kind: FeatureCache(output / cache.folder) for kind, cache in needed_caches(run, world, output).items()}
    args = make_arguments(run, folder)
    draft = new_draft(target, args)
    if run.has_input_norm is not None:
        torch.manual_seed(run.seed)
        config = draft.config
        config.input_layernorm = run.has_input_norm
        draft = MSDDraftModel(config)
    return MSDTrainer(
        model=draft,
        target=target,
        processing_class=processor,
        args=args,
        text_dataset=caches["text"],
        visual_dataset=caches["visual"],
        callbacks=callbacks,
    )


class Measurement(NamedTuple):
    """The tokens, the rounds and, if it was measured, the speedup of each prompt, and whether outputs are equal."""

    groups: list[str]
    tokens: list[int]
    rounds: list[int]
    speedups: list[float]
    identical: list[bool]


def measure(job: tuple[Run, str, Path, int, bool]) -> Measurement:
    """Measures a draft, unless that was done."""
    run, world_name, output, prompts_per_kind, has_speedup = job
    path = run.folder(output) / f"measured-{prompts_per_kind}{'-speedup' if has_speedup else ''}.json"
    if path.is_file():
        return Measurement(**json.loads(path.read_text(encoding="utf-8")))
    if not has_speedup:
        torch.set_num_threads(1)
    target, processor = load_target_and_processor(WORLDS[world_name].target)
    draft = AutoDraft.from_pretrained(run.folder(output))
    result = Measurement([], [], [], [], [])
    arguments = {"max_new_tokens": 140, "do_sample": False}
    for prompt in WORLDS[world_name].prompts(processor, prompts_per_kind):
        inputs = prompt.make_inputs()
        if has_speedup:
            comparison = compare(target, draft, inputs, repeats=1, **arguments)
            result.speedups.append(comparison.speedup())
            result.identical.append(comparison.identical())
        else:
            with_draft = timed_generate(target, inputs, draft, TREE_METHOD, **arguments)
            comparison = Comparison({TREE_METHOD.name: [with_draft]})
        lengths = comparison.runs[TREE_METHOD.name][0].acceptance_lengths
        result.groups.append(prompt.group)
        result.tokens.append(sum(lengths))
        result.rounds.append(len(lengths))
    path.write_text(json.dumps(result._asdict()) + "\n", encoding="utf-8")
    return result


class Counts(NamedTuple):
    """Tokens and rounds of the drafts of one row of the table, `[seeds, prompts]`."""

    tokens: numpy.ndarray
    rounds: numpy.ndarray

    @classmethod
    def of(cls, measured: list[Measurement], group: str) -> "Counts":
        places = [place for place, name in enumerate(measured[0].groups) if group in (name, "all")]
        tokens = numpy.array([[result.tokens[place] for place in places] for result in measured])
        return cls(tokens, numpy.array([[result.rounds[place] for place in places] for result in measured]))


def contrasts(names: list[str]) -> dict[str, tuple[str, str]]:
    """The differences that the paper speaks of, decoupling at each curriculum and two stages against the others; those
    from the recommended recipe; and those of kinds of drafts."""
    pairs = {f"decoupling, {c}": (f"decoupled, {c}", f"not decoupled, {c}") for c in CURRICULA}
    pairs |= {f"decoupling, {kind}": (f"{kind}, decoupled", f"{kind}, not decoupled") for kind in ("MSD", "EAGLE-3")}
    pairs["MSD less EAGLE-3, decoupled"] = ("MSD, decoupled", "EAGLE-3, decoupled")
    pairs["the same, at about as many parameters"] = ("MSD, decoupled, two layers", "EAGLE-3, decoupled")
    pairs |= {f"two-stage less {c}": ("decoupled, two-stage", f"decoupled, {c}") for c in CURRICULA[:-1]}
    pairs |= {f"{name} less recommended": (name, "recommended") for name in names if name != "recommended"}
    return {title: pair for title, pair in pairs.items() if set(pair) <= set(names)}


def report(
    measured: dict[str, list[Measurement]],
    parameters: dict[str, int],
    args: AblationArguments,
    output: Path,
    console: Console,
) -> None:
    world = WORLDS[args.world]
    groups = [group for group in (*KINDS, "all") if group == "all" or group in next(iter(measured.values()))[0].groups]
    taus: dict[str, dict[str, Interval]] = {}
    title = f"{args.study}, {world.visual_tokens} visual tokens, {args.layer}, equal {args.equal}, {args.seeds} seeds"
    table = Table(title=f"{title}: tau (95% interval)")
    for column in ("draft", "parameters", *groups, *(["speedup", "identical"] if args.speedup else [])):
        table.add_column(column, justify="left" if column == "draft" else "right")
    for name, results in measured.items():
        taus[name] = {group: tau_interval(*Counts.of(results, group)) for group in groups}
        cells = [f"{parameters[name]:,}", *(str(taus[name][group]) for group in groups)]
        if args.speedup:
            cells.append(f"{statistics.median(value for result in results for value in result.speedups):.2f}")
            cells.append(f"{statistics.mean(value for result in results for value in result.identical):.0%}")
        table.add_row(name, *cells)
    console.print(table)
    found = {}
    for what, (first, second) in contrasts(list(measured)).items():
        found[what] = {
            group: difference(Counts.of(measured[first], group), Counts.of(measured[second], group))
            for group in groups
        }
    if found:
        table = Table(title="differences of tau (95% interval)")
        for column in ("contrast", *groups):
            table.add_column(column, justify="left" if column == "contrast" else "right")
        for what, intervals in found.items():
            table.add_row(what, *(str(intervals[group]) for group in groups))
        console.print(table)
    name = f"{args.study}-{args.world}-{args.layer.replace(' ', '_')}-{args.equal}"
    path = output / f"{name}.json"
    content = {
        "arguments": {key: value for key, value in vars(args).items() if key != "output"},
        "parameters": parameters,
        "tau": {name: {group: vars(interval) for group, interval in row.items()} for name, row in taus.items()},
        "contrasts": {name: {group: vars(interval) for group, interval in row.items()} for name, row in found.items()},
        "measured": {name: [result._asdict() for result in results] for name, results in measured.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_taus(taus, [group for group in groups if group != "all"], path.with_suffix(".png"))
    console.print(f"Written: {path} and {path.with_suffix('.png')}")


def plot_taus(taus: dict[str, dict[str, Interval]], groups: list[str], path: Path) -> None:
    plot, axis = plt.subplots(figsize=(8.5, 0.5 * len(taus) + 1.5), layout="constrained")
    for offset, group in zip((-0.2, 0.2), groups, strict=False):
        places = [number + offset for number in range(len(taus))]
        rows = [row[group] for row in taus.values()]
        errors = [[row.value - row.low for row in rows], [row.high - row.value for row in rows]]
        axis.barh(places, [row.value for row in rows], xerr=errors, height=0.36, label=f"{group} prompts")
    axis.set_xlabel("tau")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(taus)), list(taus))
    axis.invert_yaxis()
    axis.legend()
    plot.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses()
    logging.disable_progress_bar()
    output = Path(args.output) / args.world
    world = WORLDS[args.world]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        plain = [Cache(kind, "data", "float16", ()) for kind in KINDS]  # they tell how long samples are
        list(pool.map(extract, [(cache, args.world, output, args.samples) for cache in plain]))
        runs = list_runs(args, output)
        caches = sorted({cache for run in runs for cache in needed_caches(run, world, output).values()})
        if any(cache.answers == "target" for cache in caches):
            list(pool.map(write_answers, [(kind, args.world, output, args.samples) for kind in KINDS]))
        extract_jobs = [(cache, args.world, output, args.samples) for cache in caches]
        list(tqdm(pool.map(extract, extract_jobs), total=len(caches), desc="features"))
        if args.equal == "time":
            runs = equal_time(runs, args.world, output)
        train_jobs = [(run, args.world, output) for run in runs]
        list(tqdm(pool.map(train, train_jobs), total=len(runs), desc="training"))
        measure_jobs = [(run, args.world, output, args.prompts_per_kind, args.speedup) for run in runs]
        # Times are measured after all training, one draft after another.
        mapped = map(measure, measure_jobs) if args.speedup else pool.map(measure, measure_jobs)
        results = list(tqdm(mapped, total=len(runs), desc="measuring"))
    measured: dict[str, list[Measurement]] = {}
    for run, result in zip(runs, results, strict=True):
        measured.setdefault(run.name, []).append(result)
    parameters = {run.name: AutoDraft.from_pretrained(run.folder(output)).num_parameters() for run in runs}
    report(measured, parameters, args, output, Console(width=160))


if __name__ == "__main__":
    main()
