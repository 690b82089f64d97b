"""Curves of ``growth`` as figures: points with their spread, and the fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.figure_style import CONTROL, PALETTE, figure, save

from ..prefill import FULL, LIMIT, OURS
from .fits import PARTS

COLORS = {FULL: PALETTE[0], LIMIT: CONTROL, OURS: PALETTE[1]}

Row = dict[str, Any]


def figures(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw a figure per curve.

    Args:
        rows: what ``suite.run`` returns; other rows are left out.
        folder: of the files, made if it is missing.

    Returns:
        The files, in the order of the curves.
    """
    points = [row for row in rows if row.get("suite") == "growth" and row.get("kind") == "point"]
    fits = {(row["curve"], row["way"]): row for row in rows if row.get("kind") == "fit"}
    paths = []
    for curve in dict.fromkeys(row["curve"] for row in points):
        with figure() as (fig, axes):
            _draw(axes[0, 0], [row for row in points if row["curve"] == curve], fits)
            paths.append(save(fig, Path(folder) / f"{curve.replace(' ', '-')}.png"))
    return paths


def _draw(axes: Any, points: Sequence[Row], fits: dict[tuple[str, str], Row]) -> None:
    spare = iter(PALETTE[2:])
    for way in dict.fromkeys(row["way"] for row in points):
        mine = sorted((row for row in points if row["way"] == way), key=lambda row: row["x"])
        if (found := fits.get((mine[0]["curve"], way))) is None:
            continue
        color = COLORS.get(way) or next(spare)
        x, middle = (np.array([row[name] for row in mine]) for name in ("x", "median_ms"))
        spread = [middle - [row["q1_ms"] for row in mine], [row["q3_ms"] for row in mine] - middle]
        axes.errorbar(x, middle, spread, fmt="o", color=color, capsize=2, label=way)
        line = np.linspace(0, x.max(), 100)
        parts = [found[f"{name}_ms"] for name in PARTS if f"{name}_ms" in found]
        axes.plot(line, np.polynomial.polynomial.polyval(line, parts), color=color, linewidth=1)
    axes.set(xlabel=points[0]["unit"], ylabel="ms, median and quartiles", title=f"Time against {points[0]['curve']}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
