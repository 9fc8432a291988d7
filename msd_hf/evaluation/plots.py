"""Plots of a report. Needs matplotlib: `pip install "msd-hf[bench]"`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MSDError
from ..writing.saving import replaced_file
from .methods import VANILLA
from .round_timing import PARTS


def check_matplotlib() -> None:
    """
    Checks that plots can be drawn. Call it before a long measurement.

    Raises:
        MSDError: when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MSDError('Plots need matplotlib: pip install "msd-hf[bench]", or leave --plots out.')


def draw_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """
    Draws the plots of a report: speedup by method, acceptance by depth, parts of a round. A report of a shape has only
    the plot of the parts of a round.

    Returns:
        The paths of the `.png` files.

    Raises:
        MSDError: when matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure  # pyplot would change global settings

    if report["kind"] == "shape":
        rounds = {way: figures["round_milliseconds"] for way, figures in report["round"].items()}
        plots: dict[str, Callable[[Any], None]] = {"round": lambda axes: _plot_rounds(axes, rounds)}
    else:
        methods = {name: figures for name, figures in report["methods"].items() if name != VANILLA.name}
        rounds = {name: f["round_milliseconds"] for name, f in methods.items() if f.get("round_milliseconds")}
        plots = {
            "speedup": lambda axes: _plot_speedups(axes, methods),
            "acceptance": lambda axes: _plot_acceptance(axes, methods),
            "round": lambda axes: _plot_rounds(axes, rounds),
        }
    paths = []
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        plot(figure.add_subplot())
        path = folder / f"{name}.png"
        with replaced_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        paths.append(path)
    return paths


def _plot_speedups(axes: Any, methods: Mapping[str, Any]) -> None:
    medians = [figures["speedup"]["median"] for figures in methods.values()]
    below = [m - figures["speedup"]["lower_quartile"] for m, figures in zip(medians, methods.values(), strict=True)]
    above = [figures["speedup"]["upper_quartile"] - m for m, figures in zip(medians, methods.values(), strict=True)]
    axes.bar(list(methods), medians, yerr=[below, above], capsize=4)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel("speedup over generate alone")
    axes.set_title("Speedup, whole call: median and quartiles over prompts")


def _plot_acceptance(axes: Any, methods: Mapping[str, Any]) -> None:
    for name, figures in methods.items():
        rows = figures["acceptance_by_depth"]
        axes.plot([row["depth"] for row in rows], [row["share"] for row in rows], marker="o", label=name)
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
