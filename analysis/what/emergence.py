"""Localised emergence: how many cells of the objects say what is there, and by which depth of the language model.

A cell counts if the box of an object covers half of it; it is a hit if its word names a label whose box covers it.
The control gives every object the label of an object of another picture, drawn at random: what words that fit by
chance would score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualstream.eval.statistics import Estimate, bootstrap_ratio

from .grid_objects import GridObjects

DRAWS = 20


@dataclass(frozen=True, eq=False)
class Hits:
    """Counts of one picture: hits (S,) and control (S,) (mean over draws) among `cells` that count."""

    hits: np.ndarray
    control: np.ndarray
    cells: int


def count_hits(said: np.ndarray, objects: GridObjects, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Count the cells that say a label whose box covers them.

    Args:
        said: (S, N) labels that cells say, -1 for none.
        objects: the picture's objects.
        labels: (O,) labels of the objects.

    Returns:
        (S,) int64 hits; the number of cells inside any box, whatever its label.
    """
    count = max(int(said.max(initial=-1)), int(labels.max(initial=-1))) + 1
    cover = np.concatenate([objects.label_cover(labels, count), np.zeros((1, said.shape[1]), bool)])
    return cover[said, np.arange(said.shape[1])].sum(1), int(objects.in_box[objects.label >= 0].any(0).sum())


def hits_with_control(
    said: Sequence[np.ndarray], objects: Sequence[GridObjects], seed: int = 0, draws: int = DRAWS
) -> list[Hits]:
    """Count hits of several pictures, and those of random labels.

    Args:
        said: one (S, N_i) array of labels per picture, -1 for none.
        objects: their objects.
        seed: of the control.
        draws: of the control.

    Raises:
        ValueError: fewer than two pictures have labelled objects, so that no label can be drawn from elsewhere.
    """
    pools = {number: item.label[item.label >= 0] for number, item in enumerate(objects)}
    if sum(len(pool) > 0 for pool in pools.values()) < 2:
        raise ValueError("the control needs labelled objects in at least two pictures.")
    everything = np.concatenate(list(pools.values()))
    owner = np.concatenate([np.full(len(pool), number) for number, pool in pools.items()])
    counted = []
    for number, (cells, item) in enumerate(zip(said, objects, strict=True)):
        hits, total = count_hits(cells, item, item.label)
        rng = np.random.default_rng([seed, number])
        others = everything[owner != number]
        drawn = [np.where(item.label >= 0, rng.choice(others, len(item.label)), -1) for _ in range(draws)]
        control = np.mean([count_hits(cells, item, labels)[0] for labels in drawn], axis=0)
        counted.append(Hits(hits, control, total))
    return counted


def emergence(counted: Sequence[Hits], seed: int = 0) -> dict[str, list[Estimate]]:
    """Share of hits by step, with intervals over pictures.

    Returns:
        ``emergence``, ``control`` and ``gain`` (their difference), one estimate per step.
    """
    counted = [item for item in counted if item.cells]
    if not counted:
        raise ValueError("no picture has a cell inside the box of a labelled object.")
    hits, control = (np.stack([getattr(item, name) for item in counted], axis=1) for name in ("hits", "control"))
    cells = np.array([item.cells for item in counted])

    def by_step(values: Any) -> list[Estimate]:
        return [bootstrap_ratio(row, cells, seed) for row in values]

    return {"emergence": by_step(hits), "control": by_step(control), "gain": by_step(hits - control)}


def best_step(counted: Sequence[Hits]) -> int:
    """Index of the step with the highest emergence; of equals the deepest."""
    total = np.sum([item.hits for item in counted], axis=0)
    return int(len(total) - 1 - np.argmax(total[::-1]))
