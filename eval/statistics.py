"""Intervals for the figures we print: a proportion, and a paired difference of two arms on the same questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: the point estimate.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        n: number of independent units (images) behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the four numbers as plain JSON values."""
        return asdict(self)

    def percent(self, digits: int = 1, signed: bool = False) -> str:
        """Format as percentage points, e.g. ``97.2 [96.0, 98.1]``."""
        sign = "+" if signed else ""
        value, low, high = (f"{100 * x:{sign}.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def _check_binary(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D array, got shape {values.shape}.")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must hold only 0/1 or booleans.")
    return values.astype(bool)


def proportion(correct: np.ndarray) -> Estimate:
    """Share of correct answers with Wilson's score interval.

    Args:
        correct: (n,) booleans, one per independent question.

    Raises:
        ValueError: empty, not 1-D or not binary.
    """
    correct = _check_binary(correct, "correct")
    interval = binomtest(int(correct.sum()), correct.size).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(correct.mean()), float(interval.low), float(interval.high), int(correct.size))


def paired_difference(treatment: np.ndarray, control: np.ndarray) -> Estimate:
    """Difference of two accuracies measured on the same questions, ``mean(treatment) - mean(control)``.

    The interval is Agresti and Min's adjusted Wald interval for matched pairs (half a count added to each of the
    four cells). Unlike the bootstrap it does not collapse to a point when the arms never disagree. The interval is
    shifted, if need be, to contain the plain estimate.

    Args:
        treatment: (n,) booleans.
        control: (n,) booleans in the same order.

    Raises:
        ValueError: shapes differ, or an array is empty, not 1-D or not binary.
    """
    treatment, control = _check_binary(treatment, "treatment"), _check_binary(control, "control")
    if treatment.shape != control.shape:
        raise ValueError(f"treatment and control must be paired: {treatment.size} and {control.size} answers given.")
    n = treatment.size
    gained = int((treatment & ~control).sum()) + 0.5
    lost = int((~treatment & control).sum()) + 0.5
    total = n + 2
    centre = (gained - lost) / total
    half = norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    value = float(treatment.mean() - control.mean())
    return Estimate(value, float(min(value, centre - half)), float(max(value, centre + half)), n)


def bootstrap_mean(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of a continuous per-image figure with a percentile bootstrap interval over images.

    Args:
        values: (n,) floats, one per image.
        seed: of the resampling.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: empty or not 1-D.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values must be a non-empty 1-D array, got shape {values.shape}.")
    draws = np.random.default_rng(seed).integers(0, values.size, size=(resamples, values.size))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[draws].mean(1), [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high), int(values.size))


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Ratio of the means of two figures of the same images, with a percentile bootstrap interval over images.

    Args:
        numerator: (n,) floats, one per image.
        denominator: (n,) floats of the same images, not negative, with a mean above 0.
        seed: of the resampling.
        resamples: number of bootstrap samples; those whose denominators are all 0 are left out.

    Raises:
        ValueError: shapes differ, or the denominators are negative or all 0.
    """
    numerator, denominator = (np.asarray(values, dtype=np.float64) for values in (numerator, denominator))
    if numerator.ndim != 1 or numerator.shape != denominator.shape:
        raise ValueError(f"numerator and denominator must be paired: {numerator.shape} and {denominator.shape} given.")
    if not numerator.size or denominator.min() < 0 or denominator.max() == 0:
        raise ValueError("denominator must hold no negative figure and at least one above 0.")
    draws = np.random.default_rng(seed).integers(0, numerator.size, size=(resamples, numerator.size))
    below = denominator[draws].mean(1)
    ratios = numerator[draws].mean(1)[below > 0] / below[below > 0]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Estimate(float(numerator.mean() / denominator.mean()), float(low), float(high), int(numerator.size))
