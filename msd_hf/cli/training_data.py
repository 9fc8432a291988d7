"""The commands `msd-hf extract`, `msd-hf regenerate` and `msd-hf data check`, which prepare training data."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MSDDataError
from ..limits import MOST_WORKERS
from .next_step import print_next
from .options import (
    BatchSize,
    Device,
    Dtype,
    ImageFolder,
    MaxLength,
    MaxNewTokens,
    Seed,
    Split,
    Strict,
    Subset,
    Target,
    Temperature,
    console,
    print_skipped,
)


if TYPE_CHECKING:
    from ..training import Conversations

Data = Annotated[str, typer.Option(help="Conversations: .json, .jsonl, a saved data set, or a Hub id.")]


def extract(
    target: Target,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for the features; a killed run resumes there.")],
    split: Split = None,
    subset: Subset = None,
    image_folder: ImageFolder = None,
    max_length: MaxLength = 2048,
    storage: Annotated[
        str, typer.Option(help="auto (the target's dtype), float32, bfloat16, float16 or int8.")
    ] = "auto",
    draft_kind: Annotated[
        str, typer.Option(help="As in `msd-hf train`: msd, or eagle3, whose drafts read three layers of the target.")
    ] = "msd",
    target_layers: Annotated[
        str | None, typer.Option(help="As in `msd-hf train`: ids with commas, auto or none.")
    ] = None,
    all_hidden_states: Annotated[
        bool,
        typer.Option(
            "--all-hidden-states", help="Also keep hidden states that only a draft without decoupling reads."
        ),
    ] = False,
    max_visual_rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep this many visual rows of a sample, evenly spaced, for training with the same option."
        ),
    ] = None,
    batch_size: BatchSize = 8,
    num_workers: Annotated[int, typer.Option(min=0, max=MOST_WORKERS, help="Processes that prepare samples.")] = 0,
    samples_per_shard: Annotated[
        int, typer.Option(min=1, help="Conversations per file; each of several processes writes whole files.")
    ] = 128,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Run the target over conversations once and write its features to disk for `msd-hf train`."""
    import torch

    from ..decoders import decoder_of
    from ..loading import load_processor, load_target_and_processor, outline_target
    from ..processes.group import launched
    from ..training import MSDTrainingArguments, extract_features, load_conversations
    from ..training.disk import check_writable
    from ..training.features.disk_estimate import check_disk, estimate_disk
    from ..training.features.index import check_cache_folder
    from ..training.features.storage import resolve_storage

    # The arguments are checked before the target's weights are loaded, which takes long.
    def check_arguments() -> MSDTrainingArguments:
        resolve_storage(storage, torch.float32)
        check_cache_folder(output)
        arguments = MSDTrainingArguments(draft_kind=draft_kind, target_layers=target_layers, use_cpu=True)
        check_writable(output)
        return arguments

    def announce() -> list[int] | None:
        outline = outline_target(target, dtype)
        layers = arguments.layers_of(len(decoder_of(outline).layers))
        estimate = estimate_disk(outline, load_processor(target), conversations, feature_layers=layers, **shape)
        console.print(f"This will take {estimate}.")
        if not output.exists():  # an earlier run has a part of it
            check_disk(output, estimate.num_bytes)
        return layers

    processes = launched()
    with processes.together():
        arguments = processes.from_first(check_arguments)
        conversations = load_conversations(data, image_folder, split=split, subset=subset)
        shape: dict[str, Any] = {
            "max_length": max_length,
            "storage": storage,
            "all_hidden_states": all_hidden_states,
            "max_visual_rows": max_visual_rows,
        }
        layers = processes.from_first(announce)
        model, processor = load_target_and_processor(target, dtype, processes.device(device))
        report = extract_features(
            model,
            processor,
            conversations,
            output,
            batch_size=batch_size,
            strict=strict,
            num_workers=num_workers,
            samples_per_shard=samples_per_shard,
            processes=processes,
            feature_layers=layers,
            **shape,
        )
    if processes.is_first:
        size = f"{report.num_tokens:,} tokens, {report.num_bytes / 1e6:,.1f} MB"
        console.print(f"{report.num_samples:,} samples, {size} in {output}.")
        print_skipped(report.skipped)
        settings: list[object] = [] if max_visual_rows is None else ["--max-visual-rows", max_visual_rows]
        if draft_kind != MSDTrainingArguments.draft_kind:
            settings += ["--draft-kind", draft_kind]
        if max_length != MSDTrainingArguments.max_length:
            settings += ["--max-length", max_length]
        features = (f"--{_kind(conversations)}-features", output)
        print_next("train", "--target", target, *features, *settings, "--output-dir", "DRAFT")


def regenerate_answers(
    target: Target,
    data: Annotated[
        str,
        typer.Option(
            help="Conversations whose answers are replaced, or prompts without answers: .json, .jsonl, .txt (a prompt "
            "a line), a saved data set, or a Hub id."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The .jsonl file; a killed run resumes there.")],
    split: Split = None,
    subset: Subset = None,
    image_folder: ImageFolder = None,
    max_new_tokens: MaxNewTokens = 512,
    batch_size: BatchSize = 8,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Let the target answer the prompts of a data set, so that a draft learns what the target really says."""
    from ..loading import load_target_and_processor
    from ..processes.group import launched
    from ..training import load_conversations, regenerate
    from ..training.regeneration.regenerate import check_answer_space, check_output

    processes = launched()
    with processes.together():
        processes.from_first(lambda: check_output(output))
        conversations = load_conversations(data, image_folder, split=split, subset=subset, needs_answer=False)
        processes.from_first(lambda: check_answer_space(output, conversations, max_new_tokens, processes))
        model, processor = load_target_and_processor(target, dtype, processes.device(device))
        report = regenerate(
            model,
            processor,
            conversations,
            output,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed,
            strict=strict,
            processes=processes,
        )
    if processes.is_first:
        console.print(
            f"{report.num_samples:,} conversations in {output}, {report.num_cut:,} cut at the limit.", soft_wrap=True
        )
        print_skipped(report.skipped)
        _print_train(target, _kind(conversations), output, image_folder)


def check(
    data: Data,
    target: Annotated[str, typer.Option(help="Folder or Hub id of the target, for its processor.")],
    split: Split = None,
    subset: Subset = None,
    image_folder: ImageFolder = None,
    max_length: MaxLength = 2048,
    show: Annotated[int, typer.Option(min=0, help="Number of samples to show, with coloured trained tokens.")] = 3,
    strict: Strict = False,
) -> None:
    """Encode every sample as training would, count broken samples by reason, and show a few samples."""
    from ..loading import load_processor
    from ..training.data.check import check_conversations, render_report
    from ..training.data.conversations import load_conversations

    conversations = load_conversations(data, image_folder, split=split, subset=subset)
    processor = load_processor(target)
    report = check_conversations(conversations, processor, max_length, show, strict)
    render_report(report, console)
    kind = "visual" if report.num_images else "text"
    _print_train(target, kind, data, image_folder)


def _print_train(target: str, kind: str, data: object, image_folder: Path | None) -> None:
    """Says how to train on data of one kind. The two stages need both kinds."""
    other = ("--visual-data", "VISUAL.json") if kind == "text" else ("--text-data", "TEXT.json")
    folder = [] if image_folder is None else ["--image-folder", image_folder]
    print_next("train", "--target", target, f"--{kind}-data", data, *other, *folder, "--output-dir", "DRAFT")


def _kind(conversations: Conversations) -> str:
    """Which kind of training data conversations are, by the first one that can be read."""
    for index in range(len(conversations)):
        with suppress(MSDDataError):
            return "visual" if conversations[index].images else "text"
    return "text"
