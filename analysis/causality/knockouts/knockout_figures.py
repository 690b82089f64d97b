"""Figures of a knockout run, drawn from its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.figure_style import figure, save

SIGNIFICANT = 0.05
CONTROL_WORDS = ("translated", "random")


def draw(summary: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draw one map of routes by windows per setting, and one of heads where heads were cut by themselves.

    Returns:
        File name -> what it shows.
    """
    drawn = {}
    for setting, found in summary["settings"].items():
        name = f"routes-{setting}.png"
        _routes(setting, found, summary["model"], folder / name)
        drawn[name] = f"right answers kept by route and window, {setting}"
        if any(cell["head"] >= 0 for cell in found["cells"]):
            name = f"heads-{setting}.png"
            _heads(setting, found, folder / name)
            drawn[name] = f"margin by head, {setting}"
    return drawn


def _routes(setting: str, found: dict[str, Any], model: str, path: Path) -> None:
    cells = [cell for cell in found["cells"] if cell["head"] < 0]
    routes = list(dict.fromkeys(cell["route"] for cell in cells))
    routes.sort(key=lambda route: route.startswith(CONTROL_WORDS))  # controls last, otherwise in order
    windows = list(dict.fromkeys(cell["window"] for cell in cells))
    values = np.full((len(routes), len(windows)), np.nan)
    marked = np.zeros(values.shape, dtype=bool)
    for cell in cells:
        if cell["destroyed"]:
            at = routes.index(cell["route"]), windows.index(cell["window"])
            values[at] = 100 * (1 - cell["destroyed"]["value"])
            marked[at] = cell["test"]["p_holm"] < SIGNIFICANT
    right = found["baseline"]["accuracy"]
    with figure(size=(3.2 + 0.75 * len(windows), 1.0 + 0.24 * len(routes))) as (fig, axes):
        axis = axes[0, 0]
        drawn = axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                text = f"{value:.0f}{'*' if marked[row, column] else ''}"
                color = "white" if value < 55 else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        layers = {cell["window"]: cell["layers"] for cell in cells}
        axis.set_xticks(range(len(windows)), [f"{window}\n{_span(layers[window])}" for window in windows])
        axis.set_yticks(range(len(routes)), [route.replace("->", " → ") for route in routes])
        axis.grid(False)
        first_control = next((n for n, route in enumerate(routes) if route.startswith(CONTROL_WORDS)), None)
        if first_control:
            axis.axhline(first_control - 0.5, color="white", linewidth=2)
        axis.set_title(
            f"{model}, {setting}: right answers kept, % (n = {round(right['value'] * right['n'])}; * p < 0.05, Holm)"
        )
        fig.colorbar(drawn, ax=axis, shrink=0.6)
        save(fig, path)


def _heads(setting: str, found: dict[str, Any], path: Path) -> None:
    cells = [cell for cell in found["cells"] if cell["head"] >= 0 and cell["margin_change"]]
    routes = list(dict.fromkeys(cell["route"] for cell in cells))
    columns = list(dict.fromkeys((cell["window"], cell["head"]) for cell in cells))
    values = np.full((len(routes), len(columns)), np.nan)
    for cell in cells:
        at = routes.index(cell["route"]), columns.index((cell["window"], cell["head"]))
        values[at] = cell["margin_change"]["value"]
    bound = float(np.nanmax(np.abs(values))) or 1.0
    with figure(size=(3.0 + 0.32 * len(columns), 1.2 + 0.24 * len(routes))) as (fig, axes):
        axis = axes[0, 0]
        drawn = axis.imshow(values, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")
        axis.set_xticks(range(len(columns)), [f"{window} h{head}" for window, head in columns], rotation=90)
        axis.set_yticks(range(len(routes)), [route.replace("->", " → ") for route in routes])
        axis.grid(False)
        axis.set_title(f"{setting}: change of the margin in nats, one head cut at a time")
        fig.colorbar(drawn, ax=axis, shrink=0.7)
        save(fig, path)


def _span(layers: list[int]) -> str:
    return "" if not layers else f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
