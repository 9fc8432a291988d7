"""The `msd-hf` command: one thin command for each thing that the package does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from .errors import MSDError
from .evaluation import METHODS, Comparison, compare, mean_acceptance_length
from .modeling_msd import MSDDraftModel
from .prompts import build_inputs, read_image
from .saving import replaced_folder
from .streaming import AcceptanceStreamer
from .target_support import check_pair


app = typer.Typer(
    name="msd-hf",
    help="Multimodal speculative decoding (MSD) for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console(highlight=False)

DEMO_PROMPT = "Describe the picture."

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length limit of the answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 for greedy decoding, above for sampling.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; auto: the GPU if there is one.")]
ImageFolder = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the data's.")
]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of a sample, expanded images included.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward of the target.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first broken sample.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs with and without the draft, of which medians count.")]


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="The question about the picture.")] = DEMO_PROMPT,
    image: Annotated[Path | None, typer.Option(help="A picture of your own instead of the bundled one.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    repeats: Repeats = 5,
) -> None:
    """Answer a question about a bundled picture with the bundled pair, with and without the draft."""
    from .toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR

    logging.disable_progress_bar()
    path = image or DEMO_IMAGE
    console.print(f"picture  {path.name}\nprompt   {prompt}\n")
    _run(str(TARGET_DIR), str(DRAFT_DIR), prompt, path, max_new_tokens, temperature, seed, "auto", "cpu", repeats)


@app.command()
def generate(
    target: Annotated[str, typer.Option(help="Folder or Hub id of the target.")],
    draft: Annotated[str, typer.Option(help="Folder or Hub id of its draft, ours or of the original repository.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[Path | None, typer.Option(help="The picture that the question is about.")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Ask without a picture.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    repeats: Repeats = 1,
) -> None:
    """The same for a target, a draft and a picture of your own."""
    if (image is None) != text_only:
        raise MSDError("Give a picture with --image, or ask without one with --text-only (one of the two).")
    _run(target, draft, prompt, image, max_new_tokens, temperature, seed, dtype, device, repeats)


@app.command()
def bench(
    target: Annotated[str | None, typer.Option(help="Folder or Hub id of the target.")] = None,
    draft: Annotated[str | None, typer.Option(help="Folder or Hub id of its draft.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Conversations, .json or .jsonl, whose first questions are asked.")
    ] = None,
    image_folder: ImageFolder = None,
    toy: Annotated[bool, typer.Option("--toy", help="The toy world's held-out questions and its pair.")] = False,
    num_prompts: Annotated[int, typer.Option(min=1, help="Questions.")] = 65,
    min_answer_tokens: Annotated[int, typer.Option(min=1, help="Leave out questions with shorter answers.")] = 1,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"Besides vanilla and tree: {', '.join(METHODS)}; again for more than one."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each method, in turns.")] = 3,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind the end of an answer, to the length limit.")
    ] = False,
    seed: Seed = 0,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in a published shape: llava-1.5-7b, llava-1.5-13b, ...")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, with --shape.")] = 1000,
    assume_tau: Annotated[float, typer.Option(help="Simulated acceptance, with --shape.")] = 3.8,
    nodes: Annotated[str, typer.Option(help="Sizes of trees whose verification is timed, with --shape.")] = (
        "1,4,8,16,32,64"
    ),
    output: Annotated[Path | None, typer.Option(help="Folder for report.json and report.md.")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also draw plots there. Needs matplotlib.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare decoding with a draft with other ways, on prompts; or time its rounds at the sizes of a large model."""
    from .evaluation.plots import check_matplotlib
    from .evaluation.report import print_report, write_report

    if sum((shape is not None, toy, data is not None)) != 1:
        raise MSDError("Give one of --data, --toy and --shape.")
    if plots:
        if output is None:
            raise MSDError("--plots needs a folder: add --output.")
        check_matplotlib()
    logging.disable_progress_bar()
    if shape is not None:
        report = _bench_shape(shape, context, assume_tau, nodes, repeats, dtype, device)
    else:
        from .evaluation.bench_prompts import first_questions
        from .evaluation.make_report import report_pair
        from .evaluation.methods import DEFAULT_BASELINES, choose_methods
        from .toy import DRAFT_DIR, TARGET_DIR
        from .toy.evaluate import toy_prompts
        from .training.data.conversations import load_conversations

        methods = choose_methods(DEFAULT_BASELINES if baseline is None else baseline)
        target = target or (str(TARGET_DIR) if toy else None)
        draft = draft or (str(DRAFT_DIR) if toy else None)
        if target is None or draft is None:
            raise MSDError("--data needs a --target and its --draft.")
        draft_model = MSDDraftModel.from_pretrained(draft)
        check_pair(AutoConfig.from_pretrained(target), draft_model.config)
        processor = AutoProcessor.from_pretrained(target)
        if data is None:
            prompts = toy_prompts(processor, num_prompts, seed)
        else:
            prompts = first_questions(load_conversations(data, image_folder), processor, num_prompts)
        model, _ = _load_target(target, dtype, device)
        draft_model = draft_model.to(device=model.device, dtype=model.dtype)
        report = report_pair(
            model,
            draft_model,
            prompts,
            methods,
            repeats,
            max_new_tokens,
            min_answer_tokens,
            temperature,
            seed,
            ignore_eos,
        )
    print_report(report, console)
    if output is not None:
        for path in write_report(report, output, plots):
            console.print(f"Wrote {path}", soft_wrap=True)


def _bench_shape(
    shape: str, context: int, assume_tau: float, nodes: str, repeats: int, dtype: str, device: str
) -> dict[str, Any]:
    from .evaluation.make_report import report_shape
    from .evaluation.shapes import build_pair, shape_config

    try:
        sizes = [int(number) for number in nodes.split(",") if number.strip()]
    except ValueError:
        sizes = [0]
    if any(size < 1 for size in sizes):
        raise MSDError(f"--nodes {nodes!r} is not a list of numbers like 1,4,8.")
    config = shape_config(shape)
    resolved_dtype, resolved_device = _parse_dtype(dtype), _parse_device(device)
    if isinstance(resolved_dtype, str):
        resolved_dtype = torch.float32 if resolved_device.type == "cpu" else torch.bfloat16
    target, draft = build_pair(config, resolved_dtype, resolved_device)
    return report_shape(shape, target, draft, context, assume_tau, sizes, repeats)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a draft of the original MSD repository.")],
    destination: Annotated[Path, typer.Argument(help="Folder that is made.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")] = False,
) -> None:
    """Write a draft of the original repository in this package's format."""
    if destination.exists() and not overwrite:
        raise MSDError(f"{str(destination)!r} exists: choose another name, or add --overwrite.")
    model = MSDDraftModel.from_pretrained(source)
    with replaced_folder(destination) as temporary:
        model.save_pretrained(temporary)
    console.print(f"Wrote {destination} ({model.num_parameters():,} parameters, {model.dtype}).")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a draft for a target, in two stages: text, then more and more images."""
    from .training.script import run_training

    trainer = run_training(context.args)
    if trainer.is_world_process_zero():
        metrics = trainer.provenance()["metrics"]
        for name in ("eval_tau", "eval_tau_text", "eval_tau_visual"):
            if name in metrics:
                console.print(f"{name.removeprefix('eval_'):12}{metrics[name]:.2f}")
        console.print(f"The draft is in {trainer.args.output_dir}.", soft_wrap=True)


@app.command()
def extract(
    target: Annotated[str, typer.Option(help="Folder or Hub id of the target.")],
    data: Annotated[Path, typer.Option(help="Conversations, .json or .jsonl.")],
    output: Annotated[Path, typer.Option(help="Folder for the features; a run that was killed goes on there.")],
    image_folder: ImageFolder = None,
    max_length: MaxLength = 2048,
    storage: Annotated[
        str, typer.Option(help="auto (the target's dtype), float32, bfloat16, float16 or int8.")
    ] = "auto",
    target_layers: Annotated[
        str, typer.Option(help="As in `msd-hf train`: numbers with commas, auto or none.")
    ] = "none",
    all_hidden_states: Annotated[
        bool, typer.Option("--all-hidden-states", help="Also those that only a draft without decoupling reads.")
    ] = False,
    batch_size: BatchSize = 8,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that prepare samples.")] = 0,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Run the target over conversations once and keep its features on disk for `msd-hf train`."""
    from .training import MSDTrainingArguments, extract_features, load_conversations
    from .training.features.disk_estimate import estimate_disk
    from .training.features.storage import resolve_storage

    # What can be wrong is found before the target's weights are loaded.
    resolve_storage(storage, torch.float32)
    arguments = MSDTrainingArguments(target_layers=target_layers, use_cpu=True)
    conversations = load_conversations(data, image_folder)
    model, processor = _load_target(target, dtype, device)
    layers = arguments.layers_of(len(model.get_decoder().layers))
    shape: dict[str, Any] = {"feature_layers": layers, "all_hidden_states": all_hidden_states}
    shape |= {"max_length": max_length, "storage": storage}
    estimate = estimate_disk(model, processor, conversations, **shape)
    console.print(f"This will take {estimate}.")
    report = extract_features(
        model,
        processor,
        conversations,
        output,
        batch_size=batch_size,
        strict=strict,
        num_workers=num_workers,
        **shape,
    )
    console.print(
        f"{report.num_samples:,} samples, {report.num_tokens:,} tokens, {report.num_bytes / 1e6:,.1f} MB in {output}."
    )
    _print_skipped(report.skipped)


@app.command(name="regenerate")
def regenerate_answers(
    target: Annotated[str, typer.Option(help="Folder or Hub id of the target.")],
    data: Annotated[Path, typer.Option(help="Conversations, .json or .jsonl, whose answers are replaced.")],
    output: Annotated[Path, typer.Option(help="The .jsonl file; a run that was killed goes on there.")],
    image_folder: ImageFolder = None,
    max_new_tokens: MaxNewTokens = 512,
    batch_size: BatchSize = 8,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Let the target answer the prompts of a data set itself: a draft then learns what the target really says."""
    from .training import load_conversations, regenerate
    from .training.regeneration.regenerate import check_output

    check_output(output)
    conversations = load_conversations(data, image_folder)
    model, processor = _load_target(target, dtype, device)
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
    )
    console.print(
        f"{report.num_samples:,} conversations in {output}, {report.num_cut:,} cut at the limit.", soft_wrap=True
    )
    _print_skipped(report.skipped)


@app.command()
def draft_vocab(
    target: Annotated[str, typer.Option(help="Folder or Hub id of the target.")],
    draft: Annotated[str, typer.Option(help="Folder or Hub id of its draft.")],
    data: Annotated[list[Path], typer.Option(help="Conversations, .json or .jsonl; again for more than one file.")],
    output: Annotated[Path, typer.Option(help="Folder that is made: the draft with the vocabulary.")],
    image_folder: ImageFolder = None,
    size: Annotated[
        str, typer.Option(help="Tokens; auto: as few as cover 99.5% of the data, at most a quarter of all.")
    ] = "auto",
    strict: Strict = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")] = False,
) -> None:
    """Give a draft a vocabulary of its own, the tokens that are frequent in answers: its candidates cost less."""
    from .training.data.conversations import load_conversations
    from .training.draft_vocab import (
        LARGEST_PAYING_SHARE,
        check_size,
        count_answer_tokens,
        coverage,
        frequent_tokens,
    )

    if size != "auto" and not size.lstrip("-").isdecimal():
        raise MSDError(f"--size {size!r} is neither a number nor auto.")
    number = None if size == "auto" else int(size)
    target_config = AutoConfig.from_pretrained(target)
    vocab_size = target_config.get_text_config(decoder=True).vocab_size
    if number is not None:
        check_size(number, vocab_size)
    if output.exists() and not overwrite:
        raise MSDError(f"{str(output)!r} exists: choose another name, or add --overwrite.")
    conversations = [load_conversations(path, image_folder) for path in data]
    logging.disable_progress_bar()
    model = MSDDraftModel.from_pretrained(draft)
    check_pair(target_config, model.config)

    counts = count_answer_tokens(conversations, AutoProcessor.from_pretrained(target), vocab_size, strict)
    seen = counts.counted + counts.held_out
    console.print(
        f"{int(seen.sum()):,} answer tokens in {counts.num_samples:,} conversations, "
        f"{int((seen > 0).sum()):,} different ones"
    )
    _print_skipped(counts.skipped)
    tokens = frequent_tokens(counts.counted, number)
    share = len(tokens) / vocab_size
    console.print(f"The draft's vocabulary has {len(tokens):,} of the target's {vocab_size:,} tokens ({share:.1%}).")
    console.print(f"covered       {coverage(counts.counted, tokens):.2%} of the tokens that they were ranked by")
    if int(counts.held_out.sum()):
        console.print(f"              {coverage(counts.held_out, tokens):.2%} of those of held-out conversations")
    if share > LARGEST_PAYING_SHARE:
        console.print(
            "Warning: more than half of the vocabulary saves little time and may cost acceptance.", soft_wrap=True
        )
    model.set_draft_vocab(tokens)
    with replaced_folder(output) as temporary:
        model.save_pretrained(temporary)
    console.print(f"Wrote {output}", soft_wrap=True)


@data_app.command()
def check(
    data: Annotated[Path, typer.Option(help="Conversations, .json or .jsonl.")],
    target: Annotated[str, typer.Option(help="Folder or Hub id of the target, for its processor.")],
    image_folder: ImageFolder = None,
    max_length: MaxLength = 2048,
    show: Annotated[int, typer.Option(min=0, help="Samples to show, with the trained tokens coloured.")] = 3,
    strict: Strict = False,
) -> None:
    """Encode every sample as training would; count what is broken, by reason; show a few."""
    from .training.data.check import check_conversations, render_report
    from .training.data.conversations import load_conversations

    conversations = load_conversations(data, image_folder)
    processor = AutoProcessor.from_pretrained(target)
    render_report(check_conversations(conversations, processor, max_length, show, strict), console)


def _load_target(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    resolved_dtype, resolved_device = _parse_dtype(dtype), _parse_device(device)
    processor = AutoProcessor.from_pretrained(name)
    return AutoModelForImageTextToText.from_pretrained(name, dtype=resolved_dtype).to(resolved_device), processor


def _print_skipped(skipped: Mapping[str, int]) -> None:
    for reason, count in skipped.items():
        console.print(f"skipped {count:,}: {reason}")


def _run(
    target_name: str,
    draft_name: str,
    prompt: str,
    image_path: Path | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    device: str,
    repeats: int,
) -> None:
    # What can be wrong is found before the target's weights are loaded.
    image = None if image_path is None else read_image(image_path)
    resolved_dtype = _parse_dtype(dtype)
    resolved_device = _parse_device(device)
    target_config = AutoConfig.from_pretrained(target_name)
    draft = MSDDraftModel.from_pretrained(draft_name)
    check_pair(target_config, draft.config)
    processor = AutoProcessor.from_pretrained(target_name)
    inputs = build_inputs(processor, prompt, image)
    target = AutoModelForImageTextToText.from_pretrained(target_name, dtype=resolved_dtype).to(resolved_device)
    draft = draft.to(device=resolved_device, dtype=target.dtype)
    inputs = inputs.to(resolved_device, dtype=target.dtype)
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments["temperature"] = temperature

    # The first call of anything is slower; the stream warms both up.
    streamer = AcceptanceStreamer(processor.tokenizer, console)
    torch.manual_seed(seed)
    target.generate(**inputs, **arguments, assistant_model=draft, streamer=streamer)
    torch.manual_seed(seed)
    target.generate(**inputs, **{**arguments, "max_new_tokens": min(max_new_tokens, 4)})
    _print_comparison(compare(target, draft, inputs, repeats, seed, **arguments), target)


def _print_comparison(comparison: Comparison, target: PreTrainedModel) -> None:
    table = Table(title=None, show_edge=False, pad_edge=False)
    for name in ("", "tokens", "seconds", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, runs in (("target alone", comparison.vanilla), ("with the draft", comparison.runs["tree"])):
        seconds = sorted(run.seconds for run in runs)[len(runs) // 2]
        tokens = len(runs[0].tokens)
        table.add_row(name, str(tokens), f"{seconds:.3f}", f"{tokens / seconds:.1f}")
    console.print()
    console.print(table)
    tau = mean_acceptance_length([comparison.runs["tree"][0].acceptance_lengths])
    console.print(f"\nspeedup    {comparison.speedup():.2f}")
    console.print(f"tau        {tau:.2f} tokens per verification, the bonus token included")
    if comparison.identical():
        console.print("identical  yes")
    else:
        console.print(
            f"identical  no: the {target.dtype} logits of a verification round differently from those of a single step"
        )


def _parse_dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise MSDError(f"--dtype {name!r} is not known: use auto, float32, bfloat16, float16 or float64.")
    return dtype


def _parse_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MSDError(f"--device {name!r} cannot be used on this machine.") from error
    return device


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit status 1."""
    try:
        app()
    except (OSError, ValueError) as error:  # every error of ours is a ValueError; a missing repository is an OSError
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]Error:[/bold red] {' '.join(str(error).split())}"
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
