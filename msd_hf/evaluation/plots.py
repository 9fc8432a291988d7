"""Plots of a report. Needs matplotlib: `pip install "msd-hf[bench]"`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import MSDError
from ..writing.saving import replaced_file
from .methods import TREE, VANILLA
from .prompt_figures import speedup_of
from .round_timing import PARTS


_COLOURS = ("#1f6feb", "#f0883e", "#2da44e", "#a371f7", "#e5534b", "#768390", "#39c5cf", "#d4a72c")
_OTHERS = "#a9bad0"  # methods that the draft with its own settings is compared with


def check_matplotlib(option: str = "--plots") -> None:
    """
    Checks that plots can be drawn. Call it before a long measurement.

    Args:
        option: the option that asked for plots, for the message.

    Raises:
        MSDError: when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MSDError(f'Plots need matplotlib: pip install "msd-hf[bench]", or leave {option} out.')


def draw_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """
    Draws the plots of a report: speedup by method and by prompt, acceptance by depth, parts of a round. A report of a
    shape has only the plot of the parts of a round.

    Returns:
        The paths of the `.png` files.

    Raises:
        MSDError: when matplotlib is not installed.
    """
    check_matplotlib()
    paths = []
    for name, figure in _figures(report):
        path = folder / f"{name}.png"
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        paths.append(path)
    return paths


def svg_plots(report: Mapping[str, Any]) -> dict[str, bytes]:
    """
    The plots of [`draw_plots`] as SVG documents, by name.

    Raises:
        MSDError: when matplotlib is not installed.
    """
    check_matplotlib("--html")
    documents = {}
    for name, figure in _figures(report):
        document = BytesIO()
        figure.savefig(document, format="svg", metadata={"Date": None})
        documents[name] = document.getvalue()
    return documents


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    from matplotlib.figure import Figure  # pyplot would change global settings

    if report["kind"] == "shape":
        rounds = {way: figures["round_milliseconds"] for way, figures in report["round"].items()}
        plots: dict[str, Callable[[Any], None]] = {"round": lambda axes: _plot_rounds(axes, rounds)}
    else:
        methods = {name: figures for name, figures in report["methods"].items() if name != VANILLA.name}
        rounds = {name: f["round_milliseconds"] for name, f in methods.items() if f.get("round_milliseconds")}
        plots = {
            "speedup": lambda axes: _plot_speedups(axes, methods),
            **({"prompts": lambda axes: _plot_prompts(axes, report["prompts"])} if report["prompts"] else {}),
            "acceptance": lambda axes: _plot_acceptance(axes, methods),
            "round": lambda axes: _plot_rounds(axes, rounds),
        }
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=_COLOURS)
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        yield name, figure


def _plot_speedups(axes: Any, methods: Mapping[str, Any]) -> None:
    medians = [figures["speedup"]["median"] for figures in methods.values()]
    below = [m - figures["speedup"]["lower_quartile"] for m, figures in zip(medians, methods.values(), strict=True)]
    above = [figures["speedup"]["upper_quartile"] - m for m, figures in zip(medians, methods.values(), strict=True)]
    colours = [_COLOURS[0] if name == TREE.name else _OTHERS for name in methods]
    axes.bar(list(methods), medians, yerr=[below, above], capsize=4, color=colours)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel("speedup over generate alone")
    axes.set_title("Speedup, whole call: median and quartiles over prompts")


def _plot_prompts(axes: Any, prompts: Sequence[Mapping[str, Any]]) -> None:
    for group in sorted({prompt["group"] for prompt in prompts}):
        own = [prompt for prompt in prompts if prompt["group"] == group]
        axes.scatter(
            [prompt["new_tokens"] for prompt in own], [speedup_of(p) for p in own], s=26, alpha=0.75, label=group
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("speedup over generate alone")
    axes.legend()
    axes.set_title("Speedup of each prompt, whole call, with the draft's own settings")


def _plot_acceptance(axes: Any, methods: Mapping[str, Any]) -> None:
    others = iter(_COLOURS[1:] * len(methods))
    for name, figures in methods.items():
        rows = figures["acceptance_by_depth"]
        shares = [row["share"] for row in rows]
        colour = _COLOURS[0] if name == TREE.name else next(others)
        axes.plot([row["depth"] for row in rows], shares, marker="o", label=name, color=colour)
    axes.set_xlabel("depth")
    axes.set_ylabel("share of rounds")
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.set_title("Candidates accepted, by depth")


def _plot_rounds(axes: Any, rounds: Mapping[str, Mapping[str, float]]) -> None:
    left = [0.0] * len(rounds)
    for part in PARTS.values():
        widths = [parts[part] for parts in rounds.values()]
        axes.barh(list(rounds), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("ms")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
    axes.set_title("Time of a round")


__all__ = ["check_matplotlib", "draw_plots"]
