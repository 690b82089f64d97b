"""The figure of ``analyze lens``: shares by depth, and the best depth in-sample against cross-fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.figure_style import CONTROL, PALETTE, curve, figure, save

from .lens_shares import OBJECT, SETS

COLORS = {OBJECT: PALETTE[0], "outside": CONTROL, "moved": PALETTE[5], "shuffled labels": PALETTE[3],
          "wrong image": PALETTE[2]}  # fmt: skip
ESTIMATORS = (
    ("one depth, in-sample", ("best_depth", "in_sample")),
    ("one depth, cross-fitted", ("best_depth", "cross_fitted")),
    ("per picture, in-sample\n(the published rule)", ("best_depth_per_image", "in_sample")),
    ("per picture, cross-fitted", ("best_depth_per_image", "cross_fitted")),
)


def draw(summary: dict[str, Any], path: Path) -> Path:
    """Draw the figure of a summary.

    Args:
        summary: of ``lens.summarize``, with ``model``.
        path: of the PNG.
    """
    found = {kind: summary["whole"][kind] for kind in SETS if summary["whole"][kind] is not None}
    with figure(1, 2, size=(10.5, 3.8)) as (fig, axes):
        left, right = axes[0]
        for kind, values in found.items():
            curve(left, range(len(values["by_depth"])), _percent(values["by_depth"]), kind, COLORS[kind])
        left.set(xlabel="depth (blocks of the language model run)", ylabel="cells that read as the class, %")
        left.set_ylim(bottom=-2)
        left.set_title(f"{summary['model']}: what the cells read as")
        left.legend(loc="center left" if _gap(found) else "best")
        height = 0.8 / len(found)
        for place, (kind, values) in enumerate(found.items()):
            bars = [values[part][name] for _, (part, name) in ESTIMATORS]
            at = np.arange(len(bars)) + place * height - 0.4 + height / 2
            shown = [(y, bar) for y, bar in zip(at, _percent([b for b in bars if b]), strict=False)]
            y = [position for position, _ in shown]
            value = np.array([bar["value"] for _, bar in shown])
            reach = np.array([[bar["value"] - bar["low"], bar["high"] - bar["value"]] for _, bar in shown]).T
            right.barh(y, value, height * 0.9, color=COLORS[kind], xerr=reach, error_kw={"linewidth": 0.9})
        right.set_yticks(range(len(ESTIMATORS)), [name for name, _ in ESTIMATORS])
        right.invert_yaxis()
        right.set(xlabel="cells that read as the class at the best depth, %")
        right.set_title("At the best depth, by how it is chosen")
        return save(fig, path)


def _percent(estimates: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{name: 100 * each[name] for name in ("value", "low", "high")} for each in estimates]


def _gap(found: dict[str, Any]) -> bool:
    """Whether the middle of the axis is free of curves."""
    values = [each["value"] for kind in found.values() for each in kind["by_depth"]]
    return not any(0.3 < value < 0.7 for value in values)
