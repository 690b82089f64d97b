"""Figures of E1 and E2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.figure_style import CONTROL, PALETTE, curve, figure, save

Rows = list[dict[str, Any]]


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Cosines against the step, reading against depth, and the first two components as an illustration."""
    paths = [persistence(rows, folder / "position_geometry_persistence.png")]
    if any(row["stage"] == "table" for row in rows):
        paths.insert(0, steps(rows, folder / "position_geometry_steps.png"))
    paths.append(components(rows, folder / "position_geometry_components.png"))
    return paths


def steps(rows: Rows, path: Path) -> Path:
    """Cosines of the learned table against the step, with the range of shuffled places."""
    measures = (("opposite", "opposite steps"), ("crossing", "the two axes"), ("consistency", "different origins"))
    with figure(1, 3, (11, 3)) as (fig, axes):
        for panel, (measure, heading) in zip(axes[0], measures, strict=True):
            for color, axis in zip(PALETTE, ("row", "col", ""), strict=False):
                own = sorted(
                    (r for r in rows if (r["stage"], r["measure"], r["axis"]) == ("table", measure, axis)),
                    key=lambda r: r["step"],
                )
                if own:
                    x = [row["step"] for row in own]
                    curve(panel, x, own, {"row": "vertical", "col": "horizontal", "": "both"}[axis], color)
                    null(panel, x, own, "shuffled places" if axis != "col" else None)
            panel.set(title=f"Learned table: cosine of {heading}", xlabel="step, cells", ylim=(-1.05, 1.05))
            panel.set_xticks(x)
            panel.axhline(0, color=CONTROL, linewidth=0.8)
            panel.legend()
        return save(fig, path)


def persistence(rows: Rows, path: Path) -> Path:
    """R² of row and column, and the share of variance, along the way through the model."""
    own = [row for row in rows if row["measure"] in ("image r2", "share")]
    labels = {row["number"]: label(row) for row in own}
    with figure(1, 2, (11, 3.2)) as (fig, axes):
        for color, axis in zip(PALETTE, ("row", "col"), strict=False):
            line = ordered(own, "image r2", axis)
            x = [row["number"] for row in line]
            curve(axes[0, 0], x, line, {"row": "row", "col": "column"}[axis], color)
            null(axes[0, 0], x, line, "trained on shuffled places" if axis == "row" else None)
        line = ordered(own, "share", "")
        x = [row["number"] for row in line]
        curve(axes[0, 1], x, line, "mean state of the place", PALETTE[2])
        null(axes[0, 1], x, line, "mean states at shuffled places")
        axes[0, 0].set(title="Place read linearly off a token (unseen pictures)", ylabel="R²", ylim=(-0.3, 1.05))
        axes[0, 1].set(title="Share of the states' variance that is place", ylabel="share")
        for panel in axes[0]:
            panel.set_xticks(list(labels), list(labels.values()))
            panel.set_xlabel("V: vision blocks run, C: connector, L: language-model blocks run")
            panel.legend()
        return save(fig, path)


def components(rows: Rows, path: Path) -> Path:
    """Two principal components of the cells, coloured by row and by column: an illustration, no evidence."""
    places = sorted({(row["number"], row["stage"], row["depth"]) for row in rows if row["measure"] == "component 1"})
    with figure(2, len(places), (3.3 * len(places), 5.6)) as (fig, axes):
        for column, (number, stage, depth) in enumerate(places):
            first, second = (
                next(row for row in rows if (row["number"], row["measure"]) == (number, f"component {part}"))
                for part in (1, 2)
            )
            cell = np.divmod(np.arange(len(first["points"])), first["step"])
            for panel, values, name in zip(axes[:, column], cell, ("row", "column"), strict=True):
                dots = panel.scatter(first["points"], second["points"], c=values, s=12, cmap="viridis")
                fig.colorbar(dots, ax=panel, label=name)
                panel.set_xlabel(f"component 1 ({100 * first['value']:.0f} %)")
                panel.set_ylabel(f"component 2 ({100 * second['value']:.0f} %)")
            axes[0, column].set_title("learned table" if stage == "table" else f"mean states, {stage} {depth}")
        return save(fig, path)


def null(panel: Any, x: list[int], rows: Rows, name: str | None) -> None:
    """The control as a grey band."""
    low, high = ([row[f"null_{end}"] for row in rows] for end in ("low", "high"))
    panel.plot(x, [row["null_value"] for row in rows], color=CONTROL, linestyle="--", label=name)
    panel.fill_between(x, low, high, color=CONTROL, alpha=0.25, linewidth=0)


def ordered(rows: Rows, measure: str, axis: str) -> Rows:
    """Rows of a measure along the way."""
    return sorted((r for r in rows if (r["measure"], r["axis"]) == (measure, axis)), key=lambda r: r["number"])


def label(row: dict[str, Any]) -> str:
    """A place as the axis names it."""
    return "C" if row["stage"] == "connector" else f"{row['stage'][0].upper()}{row['depth']}"
