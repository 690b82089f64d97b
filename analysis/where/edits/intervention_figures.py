"""Figure of the interventions, from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualstream.analysis.figure_style import CONTROL, PALETTE, figure, save

from ..effects import rate
from .intervention import AWAY, CONTROLS, DIRECTION, MAIN_DOSE, TOWARDS
from .intervention_effects import CONNECTOR_LABEL, outcomes, sites

if TYPE_CHECKING:
    import pandas as pd

    from dualstream.eval.statistics import Estimate

MARKERS = dict(zip((DIRECTION, *CONTROLS), "osv^D", strict=True))
LABELS = {
    DIRECTION: "direction from other pairs",
    "random": "random",
    "same_relation": "same relation",
    "other_axis": "other axis",
    "elsewhere": "direction, elsewhere",
    TOWARDS: "published, towards",
    AWAY: "published, away",
}


def draw_flips(frame: pd.DataFrame, path: Path) -> Path:
    """Answers turned, by site with controls, and by dose at the connector."""
    table = outcomes(frame)
    labels = sites(table)
    with figure(1, 2, (8.6, 3.4)) as (drawn, axes):
        panel = axes[0, 0]
        for number, method in enumerate((DIRECTION, *CONTROLS)):
            color = PALETTE[0] if method == DIRECTION else CONTROL
            own = table[(table["method"] == method) & (table["dose"] == MAIN_DOSE)]
            found = [_rate(own[own["site"] == site]) for site in labels]
            at = [place + 0.09 * (number - 2) for place in range(len(labels))]
            panel.errorbar(at, *_bars(found), color=color, marker=MARKERS[method], capsize=2, label=LABELS[method])
        panel.set_xticks(range(len(labels)), labels)
        panel.set_xlabel("place (C connector, Lk after k blocks)")
        panel.set_ylabel("answers turned, %")
        panel.set_title("dose 1")
        panel = axes[0, 1]
        for method, color in ((DIRECTION, PALETTE[0]), (TOWARDS, PALETTE[1]), (AWAY, PALETTE[2])):
            own = table[(table["method"] == method) & (table["site"] == CONNECTOR_LABEL)]
            doses = sorted(own["dose"].unique())
            found = [_rate(own[own["dose"] == dose]) for dose in doses]
            panel.errorbar(doses, *_bars(found), color=color, marker="o", capsize=2, label=LABELS[method])
        panel.set_xlabel("dose a")
        panel.set_title("at the connector")
        for panel in axes[0]:
            panel.set_ylim(-3, 103)
            panel.legend()
        return save(drawn, path)


def _rate(rows: pd.DataFrame) -> Estimate:
    return rate(rows["flip"], rows["pair_id"])


def _bars(found: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    return [each.value for each in found], [
        [each.value - each.low for each in found],
        [each.high - each.value for each in found],
    ]
