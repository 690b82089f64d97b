"""Fits of how a cost grows: polynomials without negative parts, with intervals over measured rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 500
PARTS = ("constant", "linear", "square")


@dataclass(frozen=True)
class Fit:
    """Cost as constant + linear x + square x^2, every part at least zero.

    Attributes:
        parts: (degree + 1,) coefficients, constant first, in the unit of the cost per x^power.
        low: their lower ends of 95 % bootstrap intervals over rounds.
        high: their upper ends.
        resamples: (RESAMPLES, degree + 1) coefficients of every resample.
        r_squared: share of the variance between points that the fit explains.
        worst_residual: largest relative distance of a point from the fit.
    """

    parts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    resamples: np.ndarray
    r_squared: float
    worst_residual: float

    def at(self, x: float | np.ndarray) -> np.ndarray:
        """Cost at x."""
        return polynomial(self.parts, x)

    def interval(self, x: float) -> tuple[float, float]:
        """95 % interval of the cost at x, also beyond the measured points."""
        low, high = np.percentile([polynomial(parts, x) for parts in self.resamples], [2.5, 97.5])
        return float(low), float(high)


def polynomial(parts: np.ndarray, x: float | np.ndarray) -> np.ndarray:
    """Sum of parts[i] x^i."""
    return np.polynomial.polynomial.polyval(x, parts)


def least_squares(x: np.ndarray, costs: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients (degree + 1,) of least relative squared distance, none of them negative.

    Args:
        x: (n,) at least zero, not all zero.
        costs: (n,) positive.
        degree: of the polynomial.
    """
    from scipy.optimize import nnls

    scale = np.abs(x).max()
    columns = (x[:, None] / scale) ** np.arange(degree + 1)
    parts, _ = nnls(columns / costs[:, None], np.ones(len(x)))
    return parts / scale ** np.arange(degree + 1)


def fit(x: Sequence[float], rounds: np.ndarray, degree: int, seed: int = 0) -> Fit:
    """Fit the median of rounds; rounds are resampled whole, so that what slowed all points of one stays together.

    Args:
        x: n values of the variable.
        rounds: (rounds, n) positive costs.
        degree: 1 or 2.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no more points than coefficients, or the shapes do not agree.
    """
    points, costs = np.asarray(x, dtype=float), np.median(rounds, axis=0)
    if rounds.ndim != 2 or rounds.shape[1] != len(points):
        raise ValueError(f"rounds has shape {rounds.shape}; expected (rounds, {len(points)})")
    if len(points) <= degree:
        raise ValueError(f"x has {len(points)} values, too few for a polynomial of degree {degree}")
    parts = least_squares(points, costs, degree)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(rounds), (RESAMPLES, len(rounds)))
    resamples = np.stack([least_squares(points, np.median(rounds[choice], axis=0), degree) for choice in drawn])
    low, high = np.percentile(resamples, [2.5, 97.5], axis=0)
    residuals = costs - polynomial(parts, points)
    spread = float(((costs - costs.mean()) ** 2).sum())
    explained = 1 - float((residuals**2).sum()) / spread if spread else 1.0
    return Fit(parts, low, high, resamples, explained, float(np.abs(residuals / costs).max()))
