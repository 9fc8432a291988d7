"""Writes a report as one page that needs nothing else: `msd-hf bench --html`."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import MSDError
from ..terminal import printable
from ..writing.destination import check_parent
from ..writing.saving import replace_text
from .methods import TREE, VANILLA
from .plots import check_matplotlib, svg_plots
from .prompt_figures import speedup_of, tau_of
from .report import TERMS
from .report_tables import agreement_tables, report_tables
from .tree_picture import draw_tree


if TYPE_CHECKING:
    from PIL.Image import Image

NUM_TREES = 3  # prompts whose trees are shown
MOST_ROUNDS = 12  # rounds of a prompt whose trees are shown
_LARGEST_PICTURE = 320  # pixels
# By this tag in its head a page is known as one of ours, which may be replaced.
_MARK = '<meta name="generator" content="msd-hf bench">'
_PLOTS = {  # what a reader who sees no pictures is told
    "speedup": "Speedup of each method over the target alone",
    "prompts": "Speedup of each prompt, by the length of its answer",
    "acceptance": "Share of rounds in which a candidate of each depth was accepted",
    "round": "Where the time of a round goes",
}


def check_page(path: Path) -> None:
    """
    Checks that a page can be written, before a long measurement.

    Raises:
        MSDError: when the name is not that of a page, stands for something else than a page of this command, or cannot
            be written; when matplotlib is not installed.
    """
    if path.suffix not in (".html", ".htm"):
        raise MSDError(f"--html {str(path)!r} is not the name of a page: give one that ends in .html.")
    if path.is_dir():
        raise MSDError(f"--html {str(path)!r} is a folder: give the name of a page in it.")
    check_parent(path)
    if path.exists() and _MARK not in _beginning(path):
        raise MSDError(f"--html {str(path)!r} exists, and is no page of `msd-hf bench`: choose another name.")
    check_matplotlib("--html")


def write_page(report: Mapping[str, Any], path: Path, pictures: Mapping[str, Sequence[Image]] | None = None) -> Path:
    """
    Writes a report as a page.

    Args:
        report: the report.
        path: the page.
        pictures (*optional*): the pictures of prompts, by the names of the prompts. They are shown beside their trees.

    Raises:
        MSDError: as [`check_page`] does.
    """
    check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, render_page(report, pictures))
    return path


def render_page(report: Mapping[str, Any], pictures: Mapping[str, Sequence[Image]] | None = None) -> str:
    """The page of a report; the arguments are those of [`write_page`]."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    is_pair = report["kind"] == "pair"
    prompts = {prompt["name"]: prompt for prompt in report.get("prompts", ())}
    return environment.get_template("report.html.jinja").render(
        report=report,
        is_pair=is_pair,
        headline=_headline(report) if is_pair else [],
        plots=[(_PLOTS[name], _data("image/svg+xml", svg)) for name, svg in svg_plots(report).items()],
        tables=report_tables(report),
        agreement=agreement_tables(report) if is_pair else [],
        recorded=[_shown(found, prompts, pictures or {}) for found in report.get("recorded", ())],
        prompts=[_row(prompt) for prompt in prompts.values()],
        terms=TERMS,
    )


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that come first: value, name and explanation of each."""
    tree, alone = report["methods"][TREE.name], report["methods"][VANILLA.name]
    identical, number = tree["agreement"]["identical"], report["num_prompts"]
    speedup = tree["speedup"]
    return [
        (
            f"{_number(speedup['median'])}×",
            "as fast",
            f"median over {number} prompts; quartiles {_number(speedup['lower_quartile'])} to "
            f"{_number(speedup['upper_quartile'])}",
        ),
        (_number(tree["tau"]), "tau", "tokens that a verification emits; the target alone emits 1"),
        (f"{identical}/{number}", "identical", "answers with the tokens of the target alone"),
        (
            f"{tree['tokens_per_second']:.0f}",
            "tokens/s",
            f"whole calls; the target alone: {alone['tokens_per_second']:.0f}",
        ),
    ]


def _shown(
    found: Mapping[str, Any], prompts: Mapping[str, Any], pictures: Mapping[str, Sequence[Image]]
) -> dict[str, Any]:
    """A recorded prompt: its pictures, its answer in pieces, and its trees."""
    name, rounds = found["prompt"], found["rounds"]
    pieces = [(found["first"].lstrip(), False)]
    for one in rounds:
        num_accepted = len(one["accepted"]) - 1
        pieces += [(text, place < num_accepted) for place, text in enumerate(one["emitted"])]
    return {
        "name": name,
        "question": prompts.get(name, {}).get("question", ""),
        "pictures": [_picture(image) for image in pictures.get(name, ())],
        "pieces": pieces,
        "num_tokens": len(pieces),
        "num_rounds": len(rounds),
        "rounds": [
            {
                "picture": draw_tree(one),
                "num_nodes": len(one["tokens"]),
                "num_emitted": len(one["emitted"]),
                "num_accepted": len(one["accepted"]) - 1,
            }
            for one in rounds[:MOST_ROUNDS]
        ],
    }


def _row(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt in the table of all prompts."""
    answers = prompt.get("answers")
    return {
        "name": prompt["name"],
        "group": prompt["group"],
        "prompt_tokens": prompt["prompt_tokens"],
        "new_tokens": prompt["new_tokens"],
        "tau": _number(tau_of([prompt])),
        "speedup": _number(speedup_of(prompt)),
        "question": prompt.get("question"),
        "answers": None if answers is None else _grouped(answers),
    }


def _grouped(answers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Answers with the names of the methods that gave them."""
    names: dict[str, list[str]] = {}
    for name, text in answers.items():
        names.setdefault(text, []).append(name)
    return [(", ".join(methods), text) for text, methods in names.items()]


def _shown_text(value: Any) -> Any:
    """What the template inserts: a text without control characters, HTML as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _picture(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    file = BytesIO()
    small.save(file, format="JPEG", quality=85)
    return _data("image/jpeg", file.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _beginning(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(2000)
    except OSError as error:
        raise MSDError(f"--html {str(path)!r} cannot be read: {error.strerror}.") from error


__all__ = ["MOST_ROUNDS", "NUM_TREES", "check_page", "render_page", "write_page"]
