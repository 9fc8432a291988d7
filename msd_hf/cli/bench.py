"""The command `msd-hf bench`: compares methods of decoding, times rounds at the size of a large model, or sets reports
side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MSDError
from .bench_measurements import BASELINES, PairBench, ShapeBench
from .next_step import print_next
from .options import (
    Device,
    Dtype,
    ImageFolder,
    MaxNewTokens,
    MaxVisualRows,
    OptionalTarget,
    Seed,
    Split,
    Subset,
    Temperature,
    console,
)


_SHAPE, _REPORT = "With --shape", "The report"


def bench(
    reports: Annotated[
        list[Path] | None,
        typer.Argument(help="With --compare: report.json files, or their folders.", show_default=False),
    ] = None,
    target: OptionalTarget = None,
    draft: Annotated[str | None, typer.Option(help="Folder or Hub id of its draft.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What is asked: prompts (.txt, one a line; .json, .jsonl), questions of VQA, conversations (their "
            "first questions), a saved data set, or a Hub id."
        ),
    ] = None,
    split: Split = None,
    subset: Subset = None,
    image_folder: ImageFolder = None,
    toy: Annotated[
        bool, typer.Option("--toy", help="Use the bundled toy pair and held-out questions of the toy world.")
    ] = False,
    hard: Annotated[
        bool,
        typer.Option("--hard", help="The same with the hard world: many visual tokens, answers that have to look."),
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
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_visual_rows: MaxVisualRows = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json and report.md.", rich_help_panel=_REPORT)
    ] = None,
    plots: Annotated[
        bool,
        typer.Option(
            "--plots", help="Also write plots to the folder of --output. Needs matplotlib.", rich_help_panel=_REPORT
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="One page with plots, candidate trees and agreement, which needs no other file. Needs matplotlib.",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    no_texts: Annotated[
        bool,
        typer.Option(
            "--no-texts", help="Leave questions, answers and candidates out of the report.", rich_help_panel=_REPORT
        ),
    ] = False,
    update_card: Annotated[
        Path | None,
        typer.Option(help="Folder of the draft into whose card the figures are written.", rich_help_panel=_REPORT),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Measure nothing; print the given reports side by side.", rich_help_panel=_REPORT
        ),
    ] = False,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights in a published shape: llava-1.5-7b, llava-1.5-13b, ...", rich_help_panel=_SHAPE
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.", rich_help_panel=_SHAPE)] = 1000,
    assume_tau: Annotated[
        str, typer.Option(help="Simulated tau, or several with commas.", rich_help_panel=_SHAPE)
    ] = "3.8",
    nodes: Annotated[
        str, typer.Option(help="Sizes of trees whose verification is timed.", rich_help_panel=_SHAPE)
    ] = "1,4,8,16,32,64",
    compile: Annotated[
        bool, typer.Option("--compile", help="Time compiled rounds too.", rich_help_panel=_SHAPE)
    ] = False,
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="Tokens of the draft's own vocabulary.", rich_help_panel=_SHAPE)
    ] = None,
) -> None:
    """Compare decoding with a draft to other methods on prompts, or time its rounds at the size of a large model."""
    if reports and not compare:
        raise MSDError(f"{str(reports[0])!r} is given without an option: add --compare to compare reports.")
    if compare:
        given = (target, draft, data, shape, output, html, update_card)
        if toy or hard or any(option is not None for option in given):
            raise MSDError("--compare reads reports and measures nothing: leave the other options out.")
        _compare(reports or [])
        return
    from transformers.utils import logging

    from ..evaluation.bench_journal import remove_journal
    from ..evaluation.report import print_report
    from ..processes.group import GO_ON, launched

    if sum((shape is not None, toy, hard, data is not None, bool(lmms_eval))) != 1:
        raise MSDError("Give one of --data, --toy, --hard, --shape and --lmms-eval.")
    if lmms_eval:
        if any(option is not None for option in (output, html, update_card)) or plots or compile or no_texts:
            raise MSDError("--lmms-eval only prints what lmms-eval has measured: leave the options of a report out.")
        _print_lmms_results(lmms_eval)
        return
    if data is None and (split or subset):
        raise MSDError("--split and --subset are for a data set of --data.")
    if compile and shape is None:
        raise MSDError("--compile is for --shape. On prompts, add --baseline compiled.")
    _check_report(output, plots, html)
    if update_card is not None:
        from ..hub.card import check_card

        if shape is not None:
            raise MSDError("--update-card is for measured figures, and --shape has random weights: leave one out.")
        check_card(update_card)
        draft = draft or str(update_card)
    logging.disable_progress_bar()
    measured: PairBench | ShapeBench
    processes = launched()
    if shape is not None:
        if not processes.is_alone:
            raise MSDError("--shape is timed by one process: start it without `accelerate launch`.")
        measured = ShapeBench(shape, context, assume_tau, nodes, repeats, compile, draft_vocab_size, dtype, device)
    else:
        measured = PairBench(
            target=target,
            draft=draft,
            data=data,
            world="hard" if hard else "toy",
            split=split,
            subset=subset,
            image_folder=image_folder,
            num_prompts=num_prompts,
            min_answer_tokens=min_answer_tokens,
            baselines=baseline,
            repeats=repeats,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            ignore_eos=ignore_eos,
            seed=seed,
            dtype=dtype,
            device=device,
            max_visual_rows=max_visual_rows,
            has_texts=not no_texts,
            has_trees=html is not None and not no_texts,
            processes=processes,
            journal_folder=output,
        )
    with processes.together(GO_ON if output is not None else "Nothing is kept without --output: start it again."):
        report = measured.run()
    if not processes.is_first:
        if output is not None:
            remove_journal(output, processes.index)
        return
    print_report(report, console)
    written: list[Path] = []
    if update_card is not None:
        from ..hub.card import update_results
        from ..hub.measured import results_of_bench

        written.append(update_results(update_card, results_of_bench(report, measured.data_name)))
    if output is not None:
        from ..evaluation.report import write_report

        written += write_report(report, output, plots)
        if shape is None:
            remove_journal(output)
    if html is not None:
        from ..evaluation.html_report import write_page

        written.append(write_page(report, html, measured.pictures))
    for path in written:
        console.print(f"Wrote {path}", soft_wrap=True)
    if update_card is not None:
        print_next("publish", update_card, "OWNER/NAME")
    elif data is None:
        print_next("bench", "--target", "TARGET", "--draft", "DRAFT", "--data", "PROMPTS.json")
    elif output is None:
        print_next("bench", *measured.given, "--output", "REPORT")
    else:
        print_next("bench", "--compare", output, "OTHER_REPORT")


def _print_lmms_results(paths: list[Path]) -> None:
    from ..evaluation.lmms_results import read_runs
    from ..evaluation.lmms_table import compare_runs, lmms_tables
    from ..evaluation.report import print_tables

    comparisons = compare_runs(read_runs(paths))
    print_tables(lmms_tables(comparisons), console)
    console.print()
    for note in (note for comparison in comparisons for note in comparison.notes()):
        console.print(note, soft_wrap=True)
    print_next("bench", "--target", "TARGET", "--draft", "DRAFT", "--data", "PROMPTS.json")


def _check_report(output: Path | None, plots: bool, html: Path | None) -> None:
    from ..evaluation.html_report import check_page
    from ..evaluation.plots import check_matplotlib
    from ..evaluation.report import check_folder

    if plots:
        if output is None:
            raise MSDError("--plots needs a folder: add --output.")
        check_matplotlib()
    if output is not None:
        check_folder(output)
    if html is not None:
        check_page(html)


def _compare(reports: list[Path]) -> None:
    """Prints reports side by side."""
    from ..evaluation.report import print_tables
    from ..evaluation.report_comparison import compare_reports
    from ..evaluation.saved_report import read_reports

    comparison = compare_reports(read_reports(reports))
    print_tables(comparison.tables, console)
    console.print()
    for note in comparison.notes:
        console.print(note, soft_wrap=True)
    print_next("bench", "--target", "TARGET", "--draft", "DRAFT", "--data", "PROMPTS.json", "--html", "report.html")


__all__ = ["bench"]
