"""Figure of the sensitivity to frequencies, from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dualstream.analysis.figure_style import PALETTE, figure, save

from .frequency_sensitivity import stacked_gradients

if TYPE_CHECKING:
    import pandas as pd

RELATIONS = (("horizontal", "left and right"), ("vertical", "relations along the height"))


def draw_sensitivity(frame: pd.DataFrame, path: Path) -> Path:
    """Mean absolute derivative by frequency and by block, for relations along either axis."""
    sizes = np.abs(stacked_gradients(frame))
    with figure(2, 2, (8.4, 5.6)) as (drawn, axes):
        for line, (axis, title) in zip(axes, RELATIONS, strict=True):
            chosen = sizes[(frame["axis"] == axis).to_numpy()]
            for column, (panel, label) in enumerate(zip(line, ("frequency (0 turns fastest)", "block"), strict=True)):
                own = chosen.sum(1) if column == 0 else chosen.sum(3).transpose(0, 2, 1)  # (n, 2, F or blocks)
                at = np.arange(own.shape[-1])
                for number, (name, color) in enumerate((("height", PALETTE[1]), ("width", PALETTE[0]))):
                    mean, error = own[:, number].mean(0), 1.96 * own[:, number].std(0) / np.sqrt(len(own))
                    panel.bar(at + 0.4 * number - 0.2, mean, 0.4, yerr=error, color=color, label=name, capsize=2)
                panel.set_title(title)
                panel.set_xlabel(label)
                panel.set_xticks(at)
            line[0].set_ylabel("mean |derivative|,\nnats per factor e")
        axes[0, 0].legend(title="frequencies of the")
        return save(drawn, path)
