"""The command `msd-hf bench`: compares methods of decoding, or times rounds at the size of a large model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..errors import MSDError
from .next_step import print_next
from .options import (
    Device,
    Dtype,
    ImageFolder,
    MaxNewTokens,
    MaxVisualRows,
    OptionalTarget,
    Seed,
    Temperature,
    console,
    set_visual_rows,
)


# The keys of `METHODS` in `evaluation/methods.py`, whose import takes seconds.
BASELINES = (
    "vanilla",
    "prompt-lookup",
    "assisted-chain",
    "chain",
    "tree",
    "default-size",
    "auto",
    "compiled",
    "useless-draft",
)
_Number = TypeVar("_Number", int, float)


def bench(
    target: OptionalTarget = None,
    draft: Annotated[str | None, typer.Option(help="Folder or Hub id of its draft.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Conversations, .json or .jsonl, whose first questions are asked.")
    ] = None,
    image_folder: ImageFolder = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="Use the bundled toy pair and held-out questions of the toy world.")
    ] = False,
    lmms_eval: Annotated[
        list[Path] | None,
        typer.Option("--lmms-eval", help="Results of lmms-eval, a folder or files: print scores, tau and speedup."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Questions.")] = 65,
    min_answer_tokens: Annotated[int, typer.Option(min=1, help="Leave out questions with shorter answers.")] = 1,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"A method besides vanilla and tree: {', '.join(BASELINES)}; repeat for more than one."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each method, in turns.")] = 3,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after the end of an answer, up to the length limit.")
    ] = False,
    seed: Seed = 0,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in a published shape: llava-1.5-7b, llava-1.5-13b, ...")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, with --shape.")] = 1000,
    assume_tau: Annotated[str, typer.Option(help="Simulated tau, or several with commas, with --shape.")] = "3.8",
    nodes: Annotated[str, typer.Option(help="Sizes of trees whose verification is timed, with --shape.")] = (
        "1,4,8,16,32,64"
    ),
    compile: Annotated[bool, typer.Option("--compile", help="Time compiled rounds too, with --shape.")] = False,
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="Tokens of the draft's own vocabulary, with --shape.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for report.json and report.md.")] = None,
    plots: Annotated[
        bool, typer.Option("--plots", help="Also write plots to the folder of --output. Needs matplotlib.")
    ] = False,
    update_card: Annotated[
        Path | None, typer.Option(help="Folder of the draft into whose card the figures are written.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_visual_rows: MaxVisualRows = None,
) -> None:
    """Compare decoding with a draft to other methods on prompts, or time its rounds at the size of a large model."""
    from transformers.utils import logging

    from ..evaluation.plots import check_matplotlib
    from ..evaluation.report import print_report, write_report

    if sum((shape is not None, toy, data is not None, bool(lmms_eval))) != 1:
        raise MSDError("Give one of --data, --toy, --shape and --lmms-eval.")
    if lmms_eval:
        if output is not None or plots or compile or update_card is not None:
            raise MSDError("--lmms-eval only prints: leave out --output, --plots, --compile and --update-card.")
        return _print_lmms_results(lmms_eval)
    if plots:
        if output is None:
            raise MSDError("--plots needs a folder: add --output.")
        check_matplotlib()
    if compile and shape is None:
        raise MSDError("--compile is for --shape. On prompts, add --baseline compiled.")
    if update_card is not None:
        from ..hub.card import check_card

        if shape is not None:
            raise MSDError("--update-card is for measured figures, and --shape has random weights: leave one out.")
        check_card(update_card)
        draft = draft or str(update_card)
    logging.disable_progress_bar()
    if shape is not None:
        report = _bench_shape(shape, context, assume_tau, nodes, repeats, compile, draft_vocab_size, dtype, device)
    else:
        from ..draft.modeling_msd import MSDDraftModel
        from ..evaluation.bench_prompts import first_questions
        from ..evaluation.make_report import report_pair
        from ..evaluation.methods import DEFAULT_BASELINES, choose_methods
        from ..hub.names import target_or_named
        from ..loading import load_config, load_processor, load_target
        from ..target.support import check_pair
        from ..toy import DRAFT_DIR, TARGET_DIR
        from ..toy.evaluate import toy_prompts
        from ..training.data.conversations import load_conversations

        methods = choose_methods(DEFAULT_BASELINES if baseline is None else baseline)
        target = target or (str(TARGET_DIR) if toy else None)
        draft = draft or (str(DRAFT_DIR) if toy else None)
        if draft is None:
            raise MSDError("--data needs a --draft, and its --target if the draft does not name it.")
        draft_model = MSDDraftModel.from_pretrained(draft)
        set_visual_rows(draft_model, max_visual_rows)
        target = target_or_named(target, draft_model.config)
        check_pair(load_config(target), draft_model.config)
        processor = load_processor(target)
        if data is None:
            prompts = toy_prompts(processor, num_prompts, seed)
        else:
            prompts = first_questions(load_conversations(data, image_folder), processor, num_prompts)
        model = load_target(target, dtype, device)
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
    if update_card is not None:
        from ..hub.card import update_results
        from ..hub.measured import results_of_bench

        data_name = "toy world" if data is None else data.stem
        path = update_results(update_card, results_of_bench(report, data_name))
        console.print(f"Wrote {path}", soft_wrap=True)
    if output is not None:
        for path in write_report(report, output, plots):
            console.print(f"Wrote {path}", soft_wrap=True)
    if update_card is not None:
        print_next("publish", update_card, "OWNER/NAME")
    elif data is None:
        print_next("bench", "--target", "TARGET", "--draft", "DRAFT", "--data", "CONVERSATIONS.json")
    elif output is None:
        print_next("bench", "--target", target, "--draft", draft, "--data", data, "--output", "REPORT")
    else:
        print_next("train", "--target", target, "--draft", draft, "--text-data", data, "--output-dir", "DRAFT")


def _print_lmms_results(paths: list[Path]) -> None:
    from ..evaluation.lmms_results import read_runs
    from ..evaluation.lmms_table import compare_runs, lmms_tables
    from ..evaluation.report import print_table

    comparisons = compare_runs(read_runs(paths))
    for table in lmms_tables(comparisons):
        print_table(table, console)
        console.print()
    for note in (note for comparison in comparisons for note in comparison.notes()):
        console.print(note, soft_wrap=True)
    print_next("bench", "--target", "TARGET", "--draft", "DRAFT", "--data", "CONVERSATIONS.json")


def _bench_shape(
    shape: str,
    context: int,
    assume_tau: str,
    nodes: str,
    repeats: int,
    compile: bool,
    draft_vocab_size: int | None,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    import torch

    from ..evaluation.make_report import report_shape
    from ..evaluation.shapes import build_pair, shape_config
    from ..loading import parse_device, parse_dtype
    from ..training.draft_vocab import check_size

    sizes = _numbers(int, nodes)
    if sizes is None or any(size < 1 for size in sizes):
        raise MSDError(f"--nodes {nodes!r} is not a list of numbers like 1,4,8.")
    taus = _numbers(float, assume_tau)
    if not taus:
        raise MSDError(f"--assume-tau {assume_tau!r} is not a number like 3.8, or a list like 3,4,5.")
    config = shape_config(shape)
    if draft_vocab_size is not None:
        check_size(draft_vocab_size, config.get_text_config(decoder=True).vocab_size)
    resolved_dtype, resolved_device = parse_dtype(dtype), parse_device(device)
    if isinstance(resolved_dtype, str):
        resolved_dtype = torch.float32 if resolved_device.type == "cpu" else torch.bfloat16
    target, draft = build_pair(config, resolved_dtype, resolved_device, draft_vocab_size=draft_vocab_size)
    return report_shape(shape, target, draft, context, taus, sizes, repeats, compile)


def _numbers(kind: Callable[[str], _Number], text: str) -> list[_Number] | None:
    """Reads a list of numbers with commas; `None` if one of them is not a number."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return None
