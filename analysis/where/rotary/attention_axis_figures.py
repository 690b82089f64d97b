"""Figures of the axis decomposition, from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dualstream.analysis.figure_style import CONTROL, PALETTE, figure, save

from .axis_contrasts import SCALED, STOCK, contrasts, frequency_table

if TYPE_CHECKING:
    import pandas as pd

LINES = (
    ("odd", True, PALETTE[0], "odd, own axis"),
    ("odd", False, PALETTE[4], "odd, other axis"),
    ("even", True, CONTROL, "even, own axis"),
    ("even", False, "#C4C4C4", "even, other axis"),
)


def draw_blocks(frame: pd.DataFrame, path: Path) -> Path:
    """Size of the change between opposite relations by block, for stock and scaled frequencies."""
    with figure(1, 2, (8.4, 3.0)) as (drawn, axes):
        for panel, scaling in zip(axes[0], (STOCK, SCALED), strict=True):
            table = contrasts(frame, scaling)
            horizontal = (table["axis"] == "horizontal").to_numpy()
            for part, own, color, label in LINES:
                width = horizontal if own else ~horizontal
                size = np.abs(np.where(width, table[f"{part}_w"], table[f"{part}_h"]))
                per_pair = table.assign(size=size).groupby(["block", "pair_id"])["size"].mean().unstack()
                mean, error = per_pair.mean(axis=1), 1.96 * per_pair.sem(axis=1)
                panel.errorbar(per_pair.index, mean, yerr=error, color=color, marker="o", capsize=2, label=label)
            panel.set_title(f"{scaling} frequencies")
            panel.set_xticks(sorted(table["block"].unique()))
            panel.set_xlabel("block of the vision tower (from 0)")
            panel.set_ylim(bottom=0)
        axes[0, 0].set_ylabel("|half difference of opposite\nrelations|, logits")
        drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return save(drawn, path)


def draw_frequencies(frame: pd.DataFrame, path: Path) -> Path:
    """Size of the even and odd parts on the relation's own axis by frequency."""
    with figure(1, 2, (8.4, 3.0)) as (drawn, axes):
        for panel, scaling in zip(axes[0], (STOCK, SCALED), strict=True):
            means = frequency_table(frame, scaling).mean(0)
            at = np.arange(means.shape[-1])
            panel.bar(at - 0.2, means[0], 0.4, color=CONTROL, label="even (shared)")
            panel.bar(at + 0.2, means[1], 0.4, color=PALETTE[0], label="odd (tells the side)")
            panel.set_title(f"{scaling} frequencies")
            panel.set_xlabel("frequency (0 turns fastest)")
        axes[0, 0].set_ylabel("mean |part| on the relation's\nown axis, logits")
        axes[0, 0].legend()
        return save(drawn, path)
