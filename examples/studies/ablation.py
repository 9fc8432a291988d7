"""
The effect of each part of the training, on the toy world: a table, a JSON file and a plot for each study.

    python examples/studies/ablation.py --study paper     # {decoupled, not} x {text, visual, mixed, two-stage}
    python examples/studies/ablation.py --study recipes   # the paper's, each addition to it, and the recommended one

Every draft is trained for the same number of steps on cached features of the same conversations, with the same
optimizer, and measured on held-out prompts: tau, and speedup from runs in turns. The output folder keeps finished
parts, so that a stopped run resumes. Needs `pip install -e ".[bench]"`.
"""

import json
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser
from transformers.utils import logging

from msd_hf import MSDDraftModel
from msd_hf.evaluation import METHODS, Comparison, compare, mean_acceptance_length, timed_generate
from msd_hf.loading import load_target_and_processor
from msd_hf.prompts import build_inputs
from msd_hf.toy import TARGET_DIR
from msd_hf.toy.accuracy import make_evaluation_prompts
from msd_hf.toy.dataset import ToySamples
from msd_hf.training import (
    FeatureCache,
    MSDTrainer,
    MSDTrainingArguments,
    extract_features,
    load_conversations,
    regenerate,
)


KINDS = ("text", "visual")
TREE_METHOD = METHODS["tree"]
# The fastest fixed tree of the toy pair on two CPU cores.
TREE_SETTINGS = {"num_assistant_tokens": 24, "tree_depth": 6, "tree_top_k": 4}
# The same for all runs. A draft of 0.2M parameters takes larger and fewer steps than the draft of a 7B model.
OPTIMIZER = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 16}


@dataclass
class AblationArguments:
    study: str = field(
        default="paper", metadata={"choices": ["paper", "recipes"], "help": "Which drafts are trained."}
    )
    output: str = field(default="ablation", metadata={"help": "Folder for features, drafts and results."})
    steps: int = field(default=400, metadata={"help": "Training steps of each draft."})
    samples: int = field(default=1024, metadata={"help": "Training conversations of each kind."})
    seeds: int = field(default=2, metadata={"help": "Drafts with different seeds for each row of the table."})
    prompts_per_kind: int = field(default=2, metadata={"help": "Held-out questions of each of the 13 kinds."})
    speedup: bool = field(
        default=True, metadata={"help": "Measure speedup too, which needs an otherwise idle machine; else tau alone."}
    )
    workers: int = field(default=2, metadata={"help": "Drafts that are trained at the same time, on one thread each."})


@dataclass(frozen=True)
class Run:
    """
    The training of one draft.

    Args:
        name: name in the table.
        seed: seed of the training.
        answers: `"data"` or `"target"`: who wrote the answers.
        storage: number format of the feature cache.
        arguments: training arguments that differ from the paper's.
    """

    name: str
    seed: int
    answers: str = "data"
    storage: str = "float16"
    arguments: dict[str, Any] = field(default_factory=dict)


def list_runs(study: str, num_seeds: int) -> list[Run]:
    runs = []
    for seed in range(num_seeds):
        if study == "paper":
            for decoupled in (True, False):
                for curriculum in ("text", "visual", "mixed", "two-stage"):
                    name = f"{'decoupled' if decoupled else 'not decoupled'}, {curriculum}"
                    arguments = {"decouple_visual_tokens": decoupled, "curriculum": curriculum}
                    runs.append(Run(name, seed, arguments=arguments))
        else:
            additions = {
                "start from the last layer": {"init_from_last_layer": True},
                "drafted rows, no noise": {"trained_rows": "drafted", "noise": 0.0},
                "unrolled training": {"unroll_passes": 3},
                "several layers": {"target_layers": "auto"},
            }
            runs.append(Run("paper", seed))
            runs.append(Run("paper + target-written answers", seed, "target"))
            runs += [Run(f"paper + {name}", seed, arguments=arguments) for name, arguments in additions.items()]
            runs.append(Run("paper, features in 8 bits", seed, storage="int8"))
            runs.append(Run("recommended", seed, arguments={"recipe": "recommended"}))
    return runs


def make_arguments(run: Run, folder: Path, steps: int) -> MSDTrainingArguments:
    return MSDTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        warmup_steps=steps // 20,
        seed=run.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=50,
        **{**OPTIMIZER, **run.arguments},
    )


def write_answers(job: tuple[str, Path, int]) -> None:
    """Lets the target answer the questions of one kind of conversation."""
    kind, output, num_samples = job
    path = answers_path(output, kind)
    if path.is_file():
        return
    torch.set_num_threads(1)
    target, processor = load_target_and_processor(TARGET_DIR)
    path.parent.mkdir(parents=True, exist_ok=True)
    conversations = load_conversations(ToySamples("train", num_samples, 0, kind))
    regenerate(target, processor, conversations, path, max_new_tokens=160, batch_size=64)


def answers_path(output: Path, kind: str) -> Path:
    return output / "answers" / f"{kind}.jsonl"


def extract(job: tuple["Cache", Path, int]) -> None:
    """Extracts the features of one kind of conversation, with the answers of the data or of the target."""
    cache, output, num_samples = job
    torch.set_num_threads(1)
    target, processor = load_target_and_processor(TARGET_DIR)
    written = cache.answers == "target"
    data = answers_path(output, cache.kind) if written else ToySamples("train", num_samples, 0, cache.kind)
    conversations = load_conversations(data)
    extract_features(
        target,
        processor,
        conversations,
        output / cache.folder,
        storage=cache.storage,
        batch_size=32,
        feature_layers=list(cache.layers) or None,
        all_hidden_states=True,
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


def needed_caches(run: Run, output: Path) -> dict[str, Cache]:
    num_layers = AutoConfig.from_pretrained(TARGET_DIR).text_config.num_hidden_layers
    layers = tuple(make_arguments(run, output, 1).layers_of(num_layers) or ())
    return {kind: Cache(kind, run.answers, run.storage, layers) for kind in KINDS}


def train(job: tuple[Run, Path, int]) -> None:
    """Trains one draft, unless it exists."""
    run, output, steps = job
    folder = draft_folder(output, run, steps)
    if (folder / "training_provenance.json").is_file():
        return
    torch.set_num_threads(1)
    target, processor = load_target_and_processor(TARGET_DIR)
    caches = {kind: FeatureCache(output / cache.folder) for kind, cache in needed_caches(run, output).items()}
    trainer = MSDTrainer(
        target=target,
        processing_class=processor,
        args=make_arguments(run, folder, steps),
        text_dataset=caches["text"],
        visual_dataset=caches["visual"],
    )
    trainer.train()
    for name, value in TREE_SETTINGS.items():
        setattr(trainer.model.generation_config, name, value)
    trainer.save_model()


def draft_folder(output: Path, run: Run, steps: int) -> Path:
    return output / "drafts" / f"{run.name.replace(', ', '-').replace(' ', '_')}-{steps}-seed{run.seed}"


def measure(runs: list[Run], args: AblationArguments, output: Path) -> list[dict[str, Any]]:
    """Measures tau and speedup of every draft, one after another on the same prompts."""
    target, processor = load_target_and_processor(TARGET_DIR)
    prompts = make_evaluation_prompts(args.prompts_per_kind, seed=0)
    results = []
    for run in tqdm(runs, desc="measuring"):
        draft = MSDDraftModel.from_pretrained(draft_folder(output, run, args.steps))
        result: dict[str, Any] = {"name": run.name, "seed": run.seed}
        groups = defaultdict(list)
        for prompt in prompts:
            inputs = build_inputs(processor, prompt.question, prompt.image)
            arguments = {"max_new_tokens": 140, "do_sample": False}
            if args.speedup:
                comparison = compare(target, draft, inputs, repeats=1, **arguments)
            else:
                run_with_draft = timed_generate(target, inputs, draft, TREE_METHOD, **arguments)
                comparison = Comparison({TREE_METHOD.name: [run_with_draft]})
            groups[prompt.sample_kind].append(comparison)
            groups["all"].append(comparison)
        for group, comparisons in groups.items():
            lengths = [comparison.runs[TREE_METHOD.name][0].acceptance_lengths for comparison in comparisons]
            result[f"tau_{group}"] = mean_acceptance_length(lengths)
            if args.speedup:
                result[f"speedup_{group}"] = statistics.median(comparison.speedup() for comparison in comparisons)
                result[f"identical_{group}"] = statistics.mean(comparison.identical() for comparison in comparisons)
        results.append(result)
    return results


def report(results: list[dict[str, Any]], args: AblationArguments, output: Path, console: Console) -> None:
    names = list(dict.fromkeys(result["name"] for result in results))
    figures = ("tau", "speedup") if args.speedup else ("tau",)
    columns = [f"{figure}_{group}" for figure in figures for group in (*KINDS, "all")]
    table = Table(title=f"{args.study}: {args.steps} steps, mean (least - most) of {args.seeds} seeds")
    for column in ("draft", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column == "draft" else "right")
    for name in names:
        cells = []
        for column in columns:
            values = [result[column] for result in results if result["name"] == name]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} - {max(values):.2f})")
        table.add_row(name, *cells)
    console.print(table)
    path = output / f"{args.study}.json"
    path.write_text(json.dumps({"steps": args.steps, "results": results}, indent=1) + "\n", encoding="utf-8")
    size = (4 + 4.5 * len(figures), 0.5 * len(names) + 1.5)
    plot, grid = plt.subplots(1, len(figures), figsize=size, sharey=True, layout="constrained", squeeze=False)
    axes = grid[0]
    for axis, figure_name in zip(axes, figures, strict=True):
        for offset, group in ((-0.2, "text"), (0.2, "visual")):
            rows = [[r[f"{figure_name}_{group}"] for r in results if r["name"] == name] for name in names]
            places = [number + offset for number in range(len(names))]
            axis.barh(places, [statistics.mean(row) for row in rows], height=0.36, label=f"{group} prompts")
            for place, row in zip(places, rows, strict=True):
                axis.plot(row, [place] * len(row), "k.", markersize=3)
        axis.set_xlabel(figure_name)
        axis.axvline(1, color="grey", linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].legend()
    plot.savefig(output / f"{args.study}.png", dpi=120)
    console.print(f"Written: {path} and {path.with_suffix('.png')}")


def main() -> None:
    (args,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses()
    logging.disable_progress_bar()
    output = Path(args.output)
    runs = list_runs(args.study, args.seeds)
    caches = sorted({cache for run in runs for cache in needed_caches(run, output).values()})
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        if any(cache.answers == "target" for cache in caches):
            list(pool.map(write_answers, [(kind, output, args.samples) for kind in KINDS]))
        extract_jobs = [(cache, output, args.samples) for cache in caches]
        list(tqdm(pool.map(extract, extract_jobs), total=len(caches), desc="features"))
        train_jobs = [(run, output, args.steps) for run in runs]
        list(tqdm(pool.map(train, train_jobs), total=len(runs), desc="training"))
    # After all training, so that times are measured on an idle machine.
    report(measure(runs, args, output), args, output, Console(width=160))


if __name__ == "__main__":
    main()
