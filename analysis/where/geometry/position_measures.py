"""Geometry of a field of vectors over a grid of places, in the full space and against shuffled places.

A field P is (rows, cols, d). Two displacements from one origin x share P(x): in a field without any order their
cosine is 1/2 in expectation, not 0. Central differences P(x + k) - P(x - k) along two axes share nothing; theirs is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROW, COL = "row", "col"
AXES = (ROW, COL)
ALPHAS = np.logspace(-3, 5, 9)


def steps_of(rows: int, cols: int, most: int = 6) -> list[int]:
    """Displacements that fit on both sides of an origin, the paper's quarter of the width among them."""
    longest = (min(rows, cols) - 1) // 2
    steps = {round(step) for step in np.linspace(1, longest, min(most, longest))} if longest else set()
    quarter = cols // 4
    return sorted(steps | ({quarter} if 1 <= quarter <= longest else set()))


def opposite_cosines(field: np.ndarray, axis: str, step: int) -> np.ndarray:
    """cos(P(x + k) - P(x), P(x - k) - P(x)) of every origin: -1 where the field is straight, 1/2 without order.

    Args:
        field: (rows, cols, d).
        axis: ``row`` or ``col``, along which to step.
        step: k, in cells.

    Returns:
        (rows', cols') for the origins that have both neighbours.
    """
    field = _along_first(field, axis)
    here = field[step:-step]
    cosines = cosine(field[2 * step :] - here, field[: -2 * step] - here)
    return cosines if axis == ROW else cosines.T


def crossing_cosines(field: np.ndarray, step: int) -> np.ndarray:
    """Cosine of the central differences along rows and columns at every origin: 0 where the axes are orthogonal."""
    inner = slice(step, -step)
    down = field[2 * step :, inner] - field[: -2 * step, inner]
    right = field[inner, 2 * step :] - field[inner, : -2 * step]
    return cosine(down, right)


def consistency(field: np.ndarray, axis: str, step: int) -> np.ndarray:
    """Mean cosine of an origin's central difference with those of all other origins: 1 for one shared direction.

    Returns:
        (rows', cols') as ``opposite_cosines``.
    """
    field = _along_first(field, axis)
    difference = field[2 * step :] - field[: -2 * step]
    unit = difference / np.maximum(np.linalg.norm(difference, axis=-1, keepdims=True), 1e-12)
    total, count = unit.sum((0, 1)), unit.shape[0] * unit.shape[1]
    values = (unit @ total - 1) / max(count - 1, 1)
    return values if axis == ROW else values.T


def decoded_lines(field: np.ndarray, axis: str, folds: int = 5) -> np.ndarray:
    """R² of a coordinate read linearly off the field, on lines of cells the reader never saw.

    To read the row, whole columns are held out (and the other way round), so that nothing but a direction shared by
    columns can be used. Ridge regression, its penalty chosen on the training cells by leave-one-out.

    Args:
        field: (rows, cols, d).
        axis: the coordinate to read.
        folds: groups of held-out lines.

    Returns:
        (lines,) R² on every held-out line; at most 1, negative where the mean would have been better.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold

    field = _along_first(field, axis)  # the coordinate to read is the first one now
    length, lines = field.shape[:2]
    cells, target = field.reshape(length * lines, -1), np.repeat(np.arange(length) / max(length - 1, 1), lines)
    groups = np.tile(np.arange(lines), length)
    predicted = np.empty_like(target)
    for train, test in GroupKFold(min(folds, lines)).split(cells, groups=groups):
        model = RidgeCV(ALPHAS).fit(cells[train], target[train])
        predicted[test] = model.predict(cells[test])
    error = ((predicted - target) ** 2).reshape(length, lines)
    return 1 - error.sum(0) / ((target - target.mean()) ** 2).reshape(length, lines).sum(0)


def shuffled(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The field with its cells at random places."""
    rows, cols, width = field.shape
    return field.reshape(rows * cols, width)[rng.permutation(rows * cols)].reshape(rows, cols, width)


def null_range(measure: Callable[[np.ndarray], float], field: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Mean, 2.5 % and 97.5 % quantile of a measure over fields with shuffled places."""
    rng = np.random.default_rng(seed)
    values = [measure(shuffled(field, rng)) for _ in range(draws)]
    return np.array([np.mean(values), *np.percentile(values, [2.5, 97.5])])


def _along_first(field: np.ndarray, axis: str) -> np.ndarray:
    if axis not in AXES:
        raise ValueError(f"axis={axis!r}; accepted are {', '.join(AXES)}.")
    return field if axis == ROW else field.swapaxes(0, 1)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of vectors along the last axis; 0 where one of them is 0."""
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(-1) / np.maximum(norms, 1e-12)
