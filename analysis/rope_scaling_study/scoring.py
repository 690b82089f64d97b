"""Figures from answers: individual, pair and set accuracy, with bootstrap intervals over object pairs and runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dualstream.data_builders.spatial_sft import AXES, RELATIONS
from dualstream.eval.statistics import clustered_mean

from .items import MIRRORED

METRICS = ("individual", "pair", "set")
STEPS = {"individual": 0.25, "pair": 0.5, "set": 1.0}  # what one picture can change a set's figure by
_PAIRS = [[RELATIONS.index(relation) for relation in pair] for pair in AXES.values()]


def correctness(rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Which pictures of every set were answered rightly.

    Args:
        rows: answers of one arm, run, condition and form, all pictures of every set.

    Returns:
        (sets, 4) bool, sets by number, pictures in the order of ``RELATIONS``.

    Raises:
        ValueError: a picture is missing or there twice.
    """
    found = {(row["set_id"], row["kind"]): bool(row["correct"]) for row in rows}
    sets = sorted({set_id for set_id, _ in found})
    missing = [(s, r) for s in sets for r in RELATIONS if (s, r) not in found]
    if missing or not sets:
        raise ValueError(f"answers are incomplete: {len(missing)} of {4 * len(sets)} pictures are missing.")
    return np.array([[found[s, r] for r in RELATIONS] for s in sets])


def per_set(correct: np.ndarray, metric: str) -> np.ndarray:
    """A metric of every set: the share of its pictures, of its two pairs, or the whole set.

    Args:
        correct: (sets, 4) bool.
        metric: ``individual``, ``pair`` (both pictures that differ in one axis) or ``set`` (all four).

    Returns:
        (sets,) float64.

    Raises:
        ValueError: the metric is unknown.
    """
    if metric == "individual":
        return correct.mean(1)
    if metric == "pair":
        return np.mean([correct[:, pair].all(1) for pair in _PAIRS], axis=0)
    if metric == "set":
        return correct.all(1).astype(float)
    raise ValueError(f"metric={metric!r} is unknown; known are {', '.join(METRICS)}.")


def difference(
    treatment: np.ndarray, control: np.ndarray, resamples: int = 2000, seed: int = 0, step: float = 0.0
) -> dict[str, Any]:
    """Mean difference on the same object pairs, as ``clustered_mean``, and that of every run.

    Args:
        treatment: (runs, pairs).
        control: (runs, pairs) of the same runs, or (1, pairs).
        resamples: number of bootstrap samples.
        seed: of the resampling.
        step: see ``clustered_mean``.

    Returns:
        ``value``, ``low``, ``high``, ``n``, and ``runs``, the mean difference of each run.

    Raises:
        ValueError: the pairs or runs do not match.
    """
    if treatment.shape[1:] != control.shape[1:] or control.shape[0] not in (1, treatment.shape[0]):
        raise ValueError(f"treatment and control must be paired, got shapes {treatment.shape} and {control.shape}.")
    values = treatment - control
    return {**clustered_mean(values, resamples, seed, step).to_dict(), "runs": values.mean(1).tolist()}


def flip_consistent(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Whether answers to a picture and to its mirror image fit: left and right swap, above and below stay.

    Args:
        rows: answers of one arm, run, condition and form, pictures and mirror images.

    Returns:
        (sets, 4) bool as ``correctness``; right answers are not asked for.

    Raises:
        ValueError: a mirror image is missing.
    """
    plain = {(row["set_id"], row["kind"]): row["choice"] for row in rows if not row["mirrored"]}
    mirror = {(row["set_id"], row["kind"]): row["choice"] for row in rows if row["mirrored"]}
    if plain.keys() != mirror.keys():
        raise ValueError(f"{len(plain)} pictures and {len(mirror)} mirror images do not belong together.")
    return correctness(
        {"set_id": s, "kind": kind, "correct": mirror[s, kind] == MIRRORED[choice]}
        for (s, kind), choice in plain.items()
    )


def cell_figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the choice is made by: for every condition and form the metrics, the invalid rate, and the mean nll."""
    cells = []
    for condition, form in dict.fromkeys((row["condition"], row["form"]) for row in rows):
        own = [row for row in rows if (row["condition"], row["form"]) == (condition, form) and not row["mirrored"]]
        correct = correctness(own)
        cells.append(
            {
                "condition": condition,
                "form": form,
                "n": len(own),
                **{metric: float(per_set(correct, metric).mean()) for metric in METRICS},
                "invalid": float(np.mean([not row["valid"] for row in own])),
                "nll": float(np.mean([row["nll"] for row in own])),
            }
        )
    return cells
