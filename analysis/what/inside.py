"""Do the cells of an object belong together? Attention, similarity and clusters, by vision depth (paper's appendix).

All means over pairs leave out a cell's pair with itself. Every figure of an object stands beside that of *copies*:
sets of the same size and shape, moved to where no object is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualstream.analysis.object_tokens import translated_control
from dualstream.processing import TokenGeometry

from .grid_objects import GridObjects

LEAST_CELLS = 2
COPIES = 4


def pair_means(matrix: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Mean of a matrix over all pairs of cells of two sets.

    Args:
        matrix: (N, N).
        sets: (O, N) bool, each of two cells at least.

    Returns:
        (O, O) float64; row = set of the first index. On the diagonal, pairs of a cell with itself are left out.
    """
    members = sets.astype(np.float64)
    sizes = members.sum(1)
    totals = members @ matrix @ members.T
    own = members @ np.diagonal(matrix)
    means = totals / np.outer(sizes, sizes)
    np.fill_diagonal(means, (np.diagonal(totals) - own) / (sizes * (sizes - 1)))
    return means


def cosines(states: np.ndarray) -> np.ndarray:
    """(N, N) cosine similarity of the rows of (N, d)."""
    unit = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def object_sets(
    objects: GridObjects, geometry: TokenGeometry, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Choose the objects that can be measured, and their copies on empty ground.

    Returns:
        (O',) indices of objects of two cells or more that share none with an earlier one; (O', N) bool, their cells;
        per object (C_o, N) bool, up to ``COPIES`` copies, none where nothing fits.
    """
    taken = np.zeros(objects.cells.shape[1], bool)
    chosen: list[int] = []
    for number in np.argsort(objects.cells.sum(1), kind="stable"):  # small ones first: they lie on larger ones
        cells = objects.cells[number]
        if objects.known[number] and cells.sum() >= LEAST_CELLS and not (cells & taken).any():
            chosen.append(int(number))
            taken |= cells
    every = np.flatnonzero(objects.cells.any(0) | objects.in_box.any(0))
    copies = []
    for number in chosen:
        found = translated_control(
            geometry, np.flatnonzero(objects.cells[number]), every, seed, f"{objects.image}/{number}", COPIES
        )
        sets = np.zeros((len(found), len(taken)), bool)
        for row, tokens in enumerate(found):
            sets[row, tokens] = True
        copies.append(sets)
    return np.array(chosen, np.int64), objects.cells[chosen], copies


def belonging(
    matrix: np.ndarray, sets: np.ndarray, copies: Sequence[np.ndarray], scale: float = 1.0
) -> dict[str, Any]:
    """Compare what is inside objects with what is across them, for one picture.

    Args:
        matrix: (N, N) similarity or attention.
        sets: (O, N) bool, disjoint cells of the objects.
        copies: per object (C_o, N) bool.
        scale: factor of all figures; N for attention gives 1 for uniform attention.

    Returns:
        ``inside``, ``outside`` (to cells of no object), ``others`` (to other objects; None with a single one) and
        ``copies`` (inside the copies; None without any), means over objects; ``paired`` (inside minus copies, over
        the objects that have copies, or None).
    """
    means = pair_means(matrix, sets)
    inside = np.diagonal(means)
    ground = ~sets.any(0)
    with_ground = matrix[:, ground].mean(1) if ground.any() else None
    control = [float(np.diagonal(pair_means(matrix, part)).mean()) if len(part) else None for part in copies]
    has = [number for number, value in enumerate(control) if value is not None]
    values = {
        "inside": inside.mean(),
        "outside": None if with_ground is None else np.mean([with_ground[cells].mean() for cells in sets]),
        "others": means[~np.eye(len(sets), dtype=bool)].mean() if len(sets) > 1 else None,
        "copies": np.mean([control[number] for number in has]) if has else None,
        "paired": np.mean([inside[number] - control[number] for number in has]) if has else None,
    }
    return {name: None if value is None else float(value) * scale for name, value in values.items()}


def cluster_agreement(
    states: np.ndarray, sets: np.ndarray, other_sets: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """How well k-means on the states finds the objects.

    Args:
        states: (N, d).
        sets: (O, N) bool, disjoint cells of the objects; all else is background.
        other_sets: of another picture with the same N: the control.
        seed: of k-means.

    Returns:
        Adjusted Rand indices of O + 1 clusters with the objects, and with those of the other picture; 0 is chance.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import adjusted_rand_score
    except ImportError as error:
        raise ValueError("clusters need scikit-learn: pip install 'dualstream[analysis]'.") from error
    unit = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
    found = KMeans(len(sets) + 1, n_init=4, random_state=seed).fit_predict(unit)
    truth, control = (part.T @ np.arange(1, len(part) + 1) for part in (sets, other_sets))
    return float(adjusted_rand_score(truth, found)), float(adjusted_rand_score(control, found))
