"""Figure of the erasures, from their rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dualstream.analysis.figure_style import CONTROL, PALETTE, figure, save

from .erase_effects import ELSEWHERE, OBJECTS, changes, levels
from .erased_pictures import FILLINGS

if TYPE_CHECKING:
    import pandas as pd

MARKERS = dict(zip(FILLINGS, "o^s", strict=True))


def draw_losses(frame: pd.DataFrame, path: Path) -> Path:
    """Change of accuracy by level, for the objects and for as much elsewhere."""
    found, names = changes(frame, "correct"), levels(frame)
    with figure(1, 1, (6.2, 3.3)) as (drawn, axes):
        panel = axes[0, 0]
        for what, color in ((OBJECTS, PALETTE[0]), (ELSEWHERE, CONTROL)):
            for number, filling in enumerate(FILLINGS):
                own = [(place, name) for place, name in enumerate(names) if (name, what, filling) in found]
                estimates = [found[name, what, filling].estimate for _, name in own]
                at = [place + 0.12 * (number - 1) + (0.03 if what == OBJECTS else -0.03) for place, _ in own]
                spread = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
                panel.errorbar(
                    at,
                    [e.value for e in estimates],
                    yerr=spread,
                    fmt=MARKERS[filling],
                    color=color,
                    capsize=2,
                    label=f"{what}, {filling}",
                )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(names)), names)
        panel.set_xlabel("level (P picture, C connector, Lk after k blocks)")
        panel.set_ylabel("change of accuracy, points")
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside right upper")
        return save(drawn, path)
