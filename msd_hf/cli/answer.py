"""The commands `msd-hf demo` and `msd-hf generate`: one answer, with and without the draft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import MSDError, MSDUsageError
from ..limits import DTYPE_NAMES
from .next_step import print_next
from .options import (
    REPEATS_HELP,
    Device,
    Dtype,
    MaxNewTokens,
    MaxVisualRows,
    OptionalTarget,
    Repeats,
    Seed,
    Temperature,
    console,
    set_visual_rows,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..draft.modeling_msd import MSDDraftModel
    from ..evaluation import Comparison

DEMO_PROMPT = "Describe the picture."


def _web_option(help_: str, **arguments: Any) -> Any:
    return typer.Option(help=help_, rich_help_panel="Options of --web", **arguments)


def demo(
    prompt: Annotated[str, typer.Option(help="The question about the picture.")] = DEMO_PROMPT,
    image: Annotated[Path | None, typer.Option(help="A picture of your own instead of the bundled one.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    repeats: Annotated[int | None, typer.Option(min=1, help=f"{REPEATS_HELP} Default: 5.")] = None,
    web: Annotated[bool, typer.Option("--web", help="Serve a page to ask questions on, until Ctrl-C.")] = False,
    target: Annotated[str | None, _web_option("Folder or Hub id of a target of your own.")] = None,
    draft: Annotated[str | None, _web_option("Folder or Hub id of its draft.")] = None,
    dtype: Annotated[str | None, _web_option(f"{DTYPE_NAMES}; default: auto.")] = None,
    device: Annotated[str | None, _web_option("cpu, cuda, ...; default: auto; cpu for the bundled pair.")] = None,
    host: Annotated[str | None, _web_option("Address to serve from; default: 127.0.0.1, this machine alone.")] = None,
    port: Annotated[int | None, _web_option("Port; default: the first free one from 7860.", min=1, max=65535)] = None,
) -> None:
    """Answer a question about a bundled picture with the bundled pair, with and without the draft."""
    from transformers.utils import logging

    from ..toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR

    logging.disable_progress_bar()
    path = image or DEMO_IMAGE
    if web:
        from .web import serve_page

        if repeats is not None:
            raise MSDUsageError("--repeats does not go with --web: there each click is one run.")
        arguments = _generate_arguments(max_new_tokens, temperature)
        serve_page(prompt, path, target, draft, dtype, device, host, port, arguments, seed)
        return
    given = {"target": target, "draft": draft, "dtype": dtype, "device": device, "host": host, "port": port}
    for name, value in given.items():
        if value is not None:
            raise MSDUsageError(f"--{name} is for the page of the demo: add --web, or use `msd-hf generate`.")
    console.print(f"picture  {path.name}\nprompt   {prompt}\n")
    _run(str(TARGET_DIR), str(DRAFT_DIR), prompt, path, max_new_tokens, temperature, seed, "auto", "cpu", repeats or 5)
    print_next("generate", "--target", "TARGET", "--draft", "DRAFT", "--image", "PICTURE", "--prompt", "QUESTION")


def generate(
    draft: Annotated[str, typer.Option(help="Folder or Hub id of its draft, ours or of the original repository.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    target: OptionalTarget = None,
    image: Annotated[Path | None, typer.Option(help="The picture that the question is about.")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Ask without a picture.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    repeats: Repeats = 1,
    max_visual_rows: MaxVisualRows = None,
) -> None:
    """Answer a question with your own target and draft, with and without the draft."""
    if (image is None) != text_only:
        raise MSDError("Give a picture with --image, or ask without one with --text-only (one of the two).")
    target = _run(
        target, draft, prompt, image, max_new_tokens, temperature, seed, dtype, device, repeats, max_visual_rows
    )
    print_next("bench", "--target", target, "--draft", draft, "--data", "CONVERSATIONS.json")


def _run(
    target_name: str | None,
    draft_name: str,
    prompt: str,
    image_path: Path | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    device: str,
    repeats: int,
    max_visual_rows: str | None = None,
) -> str:
    """Prints an answer and a comparison. Returns the name of the target, which the draft may have given."""
    import torch

    from ..evaluation import compare
    from ..images import read_image
    from ..loading import load_target
    from ..prompts import build_inputs
    from .streaming import AcceptanceStreamer

    # All inputs are checked before the target's weights are loaded, which takes long.
    image = None if image_path is None else read_image(image_path)
    target_name, draft, processor = load_draft_and_processor(target_name, draft_name, dtype, device)
    set_visual_rows(draft, max_visual_rows)
    inputs = build_inputs(processor, prompt, image)
    target = load_target(target_name, dtype, device)
    draft = draft.to(device=target.device, dtype=target.dtype)
    inputs = inputs.to(target.device, dtype=target.dtype)
    arguments = _generate_arguments(max_new_tokens, temperature)

    # First calls are slower. These two warm up `generate` with and without the draft; the first shows the answer.
    streamer = AcceptanceStreamer(processor.tokenizer, console)
    torch.manual_seed(seed)
    target.generate(**inputs, **arguments, assistant_model=draft, streamer=streamer)
    torch.manual_seed(seed)
    target.generate(**inputs, **{**arguments, "max_new_tokens": min(max_new_tokens, 4)})
    console.print(f"\ntiming {repeats} run{'s' * (repeats > 1)} with the draft and without it ...")
    _print_comparison(compare(target, draft, inputs, repeats, seed, **arguments), target)
    return target_name


def load_draft_and_processor(
    target_name: str | None, draft_name: str, dtype: str, device: str
) -> tuple[str, MSDDraftModel, Any]:
    """Loads what a target needs beside its weights, and checks that it all fits: the name of the target, which the
    draft may give, the draft, and the target's processor."""
    from ..draft.auto import AutoDraft
    from ..hub.names import target_or_named
    from ..loading import load_config, load_processor, parse_device, parse_dtype
    from ..target.support import check_pair

    parse_dtype(dtype)
    parse_device(device)
    if target_name is not None:
        load_config(target_name)
    draft = AutoDraft.from_pretrained(draft_name)
    if target_name is None:
        target_name = target_or_named(None, draft.config)
        console.print(f"target   {target_name}, which the draft names", soft_wrap=True)
    check_pair(load_config(target_name), draft.config)
    return target_name, draft, load_processor(target_name)


def _generate_arguments(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    arguments: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments["temperature"] = temperature
    return arguments


def _print_comparison(comparison: Comparison, target: PreTrainedModel) -> None:
    from ..evaluation import mean_acceptance_length

    table = Table(title=None, show_edge=False, pad_edge=False)
    for name in ("", "tokens", "seconds", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, runs in (("target alone", comparison.vanilla), ("with the draft", comparison.runs["tree"])):
        seconds = sorted(run.seconds for run in runs)[len(runs) // 2]
        tokens = len(runs[0].tokens)
        table.add_row(name, str(tokens), f"{seconds:.3f}", f"{tokens / seconds:.1f}")
    console.print()
    console.print(table)
    # Automatic trees differ from run to run.
    lengths = [run.acceptance_lengths for run in comparison.runs["tree"] if run.acceptance_lengths]
    console.print(f"\nspeedup    {comparison.speedup():.2f}")
    if lengths:
        tau = mean_acceptance_length(lengths)
        console.print(f"tau        {tau:.2f} tokens per verification, the bonus token included")
    else:
        console.print("tau        none: an answer of one token needs no draft")
    if comparison.identical():
        console.print("identical  yes")
    else:
        console.print(
            f"identical  no: the {target.dtype} logits of a verification round differently from those of a single step"
        )
