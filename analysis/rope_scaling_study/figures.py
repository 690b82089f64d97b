"""Figures, drawn from ``summary.json`` and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .report import PLACES, arm_name

COLORS = {False: "#5b7fa6", True: "#c0603a"}


def draw_figures(folder: Path) -> list[Path]:
    """Draw ``grid.png`` and ``arms.png`` from the summary in a folder, into that folder.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'dualstream[train]'.") from error

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    paths = []
    for name, draw, size in (("grid", draw_grid, (11, 7.5)), ("arms", draw_arms, (11, 6.5))):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, summary)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def draw_grid(figure: Any, summary: Mapping[str, Any]) -> None:
    """The whole grid on validation pictures: heat maps over alpha and p of `poly`, and all other scalings as bars."""
    conditions = summary["design"]["conditions"]
    places = {place: [c["name"] for c in conditions if c["distribution"] == place] for place in PLACES}
    places = {place: names for place, names in places.items() if names}
    stock = next(row for row in summary["grid"] if row["arm"] == "stock")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    for axes, (place, names) in zip(np.atleast_1d(top.subplots(1, len(places))), places.items(), strict=True):
        _heat_map(axes, summary, stock, names)
        axes.set_title(PLACES[place], fontsize=9)
    axes = bottom.subplots()
    rows = [row for row in summary["grid"] if not row["arm"].startswith("poly")]
    rows += [{**row, "arm": f"SFT {row['arm']}"} for row in summary["tuned_grid"]]
    values = [100 * row["accuracy"] for row in rows]
    axes.barh(range(len(rows)), values, color=[COLORS[row["arm"].startswith("SFT")] for row in rows])
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(max(0, min(values) - 5), min(100, max(values) + 2))
    axes.set_xlabel("accuracy on validation pictures, mean of conditions and forms, %")
    figure.suptitle(
        "The whole grid, on validation pictures; above: poly, accuracy minus stock tower, points", fontsize=10
    )


def _heat_map(axes: Any, summary: Mapping[str, Any], stock: Mapping[str, Any], names: list[str]) -> None:
    def accuracy(row: Mapping[str, Any]) -> float:
        return float(np.mean([cell["individual"] for cell in row["cells"] if cell["condition"] in names]))

    found = {
        (row["scaling"]["alpha"], row["scaling"]["p"]): 100 * (accuracy(row) - accuracy(stock))
        for row in summary["grid"]
        if row["scaling"] and row["scaling"]["type"] == "poly"
    }
    alphas, ps = (sorted({key[index] for key in found}) for index in (0, 1))
    if not found:
        axes.set_axis_off()
        return
    table = np.array([[found.get((alpha, p), np.nan) for p in ps] for alpha in alphas])
    limit = max(1.0, float(np.nanmax(np.abs(table))))
    axes.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(table):
        color = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(ps)), [f"{p:g}" for p in ps])
    axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_xlabel("p")
    axes.set_ylabel("alpha")


def draw_arms(figure: Any, summary: Mapping[str, Any]) -> None:
    """Accuracy of all arms, and their paired differences to the stock tower with the same tuning."""
    form = summary["design"]["forms"][0]
    arms = summary["arms"]
    present = {c["distribution"] for c in summary["design"]["conditions"]}
    places = [place for place in PLACES if place in present]
    axes = np.atleast_2d(figure.subplots(2, len(places), sharey="row", height_ratios=[1, 1]))
    for column, place in enumerate(places):
        _points(axes[0, column], arms, [arm["accuracy"][place][form]["individual"] for arm in arms])
        axes[0, column].set_title(PLACES[place], fontsize=9)
        axes[0, column].set_xlabel(f"individual accuracy, {form}, %", fontsize=8)
        others = [arm for arm in arms if _difference(arm)]
        _points(axes[1, column], others, [_difference(arm)[place][form]["individual"] for arm in others])
        axes[1, column].axvline(0, color="black", linewidth=0.8)
        axes[1, column].set_xlabel("difference to the stock tower, same tuning, points", fontsize=8)
    for axis in axes[:, 0]:
        axis.invert_yaxis()


def _difference(arm: Mapping[str, Any]) -> Any:
    return arm["difference_to_stock"] if arm["tuned"] else arm["difference_to_baseline"]


def _points(axes: Any, arms: list[Any], estimates: list[Any]) -> None:
    for row, (arm, estimate) in enumerate(zip(arms, estimates, strict=True)):
        value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
        axes.plot([low, high], [row, row], color=COLORS[arm["tuned"]], linewidth=1.6)
        axes.plot([value], [row], "o", color=COLORS[arm["tuned"]], markersize=5)
    axes.set_yticks(range(len(arms)), [arm_name(arm) for arm in arms], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
