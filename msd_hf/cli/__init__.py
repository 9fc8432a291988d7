"""The `msd-hf` command and its subcommands, which only parse options, call the library and print."""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer

from . import answer, bench, checkpoints, publishing, train, training_data
from .failures import exit_status


app = typer.Typer(
    name="msd-hf",
    help="Multimodal speculative decoding (MSD) for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(answer.demo)
app.command()(answer.generate)
app.command()(bench.bench)
app.command()(checkpoints.convert)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(
    train.train
)
app.command()(training_data.extract)
app.command(name="regenerate")(training_data.regenerate_answers)
app.command()(checkpoints.draft_vocab)
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
