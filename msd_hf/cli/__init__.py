"""The `msd-hf` command and its subcommands, which only parse options, call the library and print.

The modules of commands import torch, transformers and the other rooms inside their functions, so that help, version
and shell completion take no time.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from ..version import __version__
from . import answer, bench, checkpoints, doctor, exporting, publishing, serve, train, training_data, tune
from .failures import exit_status


app = typer.Typer(
    name="msd-hf",
    help="Multimodal speculative decoding (MSD) for Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"msd-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


app.command()(answer.demo)
app.command()(answer.generate)
app.command()(serve.serve)
app.command()(bench.bench)
app.command()(checkpoints.convert)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(
    train.train
)
app.command()(training_data.extract)
app.command(name="regenerate")(training_data.regenerate_answers)
app.command()(checkpoints.draft_vocab)
app.command()(tune.tune)
app.command()(exporting.export)
app.command()(doctor.doctor)
app.command()(publishing.drafts)
app.command()(publishing.card)
app.command()(publishing.publish)

data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
data_app.command()(training_data.check)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point. An error is one line on standard error, see [`~msd_hf.cli.failures.exit_status`]."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may know fewer characters than answers and paths have
            stream.reconfigure(errors="backslashreplace")
    sys.exit(exit_status(app))


__all__ = ["app", "main"]
