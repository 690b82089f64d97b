"""Figures of E3 and E4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.figure_style import CONTROL, PALETTE, curve, figure, save
from dualstream.eval.statistics import Estimate, bootstrap_mean

from .relation_measures import (
    axis_differences,
    centred,
    cosines,
    crossing,
    mean_separation,
    separation,
    shared_direction,
)
from .relation_study import PERMUTED, PLACES_ONLY, PROBED, Study


def draw(study: Study, folder: Path) -> list[Path]:
    """Geometry along the way, probes along the way, and the mean table of cosines at three places."""
    paths = [
        geometry(study, folder / "relation_vectors_geometry.png"),
        tables(study, folder / "relation_vectors_cosines.png"),
    ]
    return [*paths, probes(study, folder / "relation_vectors_probes.png")] if study.is_probed else paths


def geometry(study: Study, path: Path) -> Path:
    """Separation, crossing and shared directions at every place."""
    x = [number for number, _, _ in study.places]
    with figure(1, 3, (12, 3.2)) as (fig, axes):
        means = [Estimate(*mean_separation(study.vectors(n)), len(study.pair_ids)) for n in x]
        curve(axes[0, 0], x, means, "mean vectors over pairs", PALETTE[0])
        curve(axes[0, 0], x, [bootstrap_mean(separation(study.vectors(n))) for n in x], "single pairs", PALETTE[1])
        noise = [bootstrap_mean(study.column(n, "noise_separation")) for n in x]
        curve(axes[0, 0], x, noise, "noise tokens", CONTROL, linestyle="--")
        axes[0, 0].set(title="Opposites against wrong pairs", ylabel="separation", ylim=(-1.6, 1.6))
        curve(axes[0, 1], x, [bootstrap_mean(np.abs(crossing(study.vectors(n)))) for n in x], "A - B", PALETTE[0])
        noise = [bootstrap_mean(study.column(n, "noise_crossing")) for n in x]
        curve(axes[0, 1], x, noise, "noise tokens", CONTROL, linestyle="--")
        axes[0, 1].set(title="Horizontal against vertical direction", ylabel="|cosine|", ylim=(-0.05, 1.05))
        for axis, name in enumerate(("left - right", "high - low")):
            found = [shared_direction(axis_differences(study.vectors(n))[:, [axis]]) for n in x]
            shared = [Estimate(*each, len(study.pair_ids)) for each in found]
            curve(axes[0, 2], x, shared, name, PALETTE[axis])
        axes[0, 2].axhline(0, color=CONTROL, linestyle="--")
        axes[0, 2].set(title="Direction shared with other pairs", ylabel="cosine", ylim=(-0.2, 1.05))
        _name_places(axes[0], study)
        return save(fig, path)


def probes(study: Study, path: Path) -> Path:
    """Accuracy of the probes at every place; A alone where it stands still and where it moves."""
    x = [number for number, _, _ in study.places]
    with figure(1, 2, (11, 3.6)) as (fig, axes):
        for color, feature in zip(PALETTE, PROBED, strict=False):
            curve(axes[0, 0], x, [study.accuracy(n, feature) for n in x], feature, color)
        curve(axes[0, 0], x, [study.renamed_accuracy(n) for n in x], PERMUTED, CONTROL, linestyle="--")
        axes[0, 0].axhline(0.25, color=CONTROL, linewidth=0.8)
        place = study.accuracy(x[0], PLACES_ONLY).value
        axes[0, 0].axhline(place, color=CONTROL, linestyle=":", label=PLACES_ONLY)
        axes[0, 0].set(title="Relation of unseen objects, four ways", ylabel="accuracy", ylim=(0, 1.05))
        for color, still, name in ((PALETTE[0], True, "A stands still"), (PALETTE[1], False, "A moves")):
            line: list[Any] = [study.paired_accuracy(n, still) for n in x]
            if line[0] is not None:
                curve(axes[0, 1], x, [found for found, _ in line], name, color)
                ends = [[getattr(chance, end) for _, chance in line] for end in ("low", "high")]
                axes[0, 1].fill_between(x, *ends, color=CONTROL, alpha=0.2, linewidth=0, label=f"by chance, {name}")
        axes[0, 1].axhline(0.5, color=CONTROL, linestyle="--")
        axes[0, 1].set(title="Which of two opposite pictures, from A alone", ylabel="accuracy", ylim=(0, 1.05))
        _name_places(axes[0], study)
        return save(fig, path)


def tables(study: Study, path: Path) -> Path:
    """Mean cosines of the four vectors of a pair, centred, at the places that the statements are about."""
    numbers = study.key_places()
    with figure(1, len(numbers), (3.4 * len(numbers), 3.2)) as (fig, axes):
        for panel, number in zip(axes[0], numbers, strict=True):
            values = cosines(centred(study.vectors(number))).mean(0)
            panel.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
            panel.grid(False)
            for row, column in np.ndindex(4, 4):
                panel.text(
                    column,
                    row,
                    f"{values[row, column]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=_ink(values[row, column]),
                )
            panel.set_xticks(range(4), study.relations)
            panel.set_yticks(range(4), study.relations)
            panel.set_title(study.name(number)[0].upper() + study.name(number)[1:])
        return save(fig, path)


def _ink(value: float) -> str:
    return "white" if abs(value) > 0.7 else "black"


def _name_places(panels: Any, study: Study) -> None:
    names = ["C" if stage == "connector" else f"{stage[0].upper()}{depth}" for _, stage, depth in study.places]
    for panel in panels:
        panel.set_xticks([number for number, _, _ in study.places], names)
        panel.set_xlabel("V: vision, C: connector, L: language model; blocks run")
        panel.legend()
