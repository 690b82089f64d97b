"""Intervals for the figures we print: shares, means, ratios and paired differences, also of clustered observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

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


def _normal_quantile() -> float:
    """How many standard deviations the interval reaches to either side."""
    from scipy.stats import norm  # takes longer to import than a command's --help without it

    return float(norm.ppf((1 + CONFIDENCE) / 2))


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
    from scipy.stats import binomtest

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
    half = _normal_quantile() * np.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
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


def clustered_mean(values: np.ndarray, resamples: int = 2000, seed: int = 0, step: float = 0.0) -> Estimate:
    """Mean of a figure of runs (or draws, seeds) and units they share, with a bootstrap interval over both.

    Units (images, object pairs) are drawn as wholes, the same ones for all runs, since all runs saw the same units;
    runs are drawn independently of them. With one run the interval is over the units alone.

    Where all units agree a bootstrap interval is a point, which says too much. Two made-up units, one a step above the
    mean and one below, keep it from collapsing: with 60 units that agree, it reaches as far as the changes that 60
    units would miss with a chance of about 5 %.

    Args:
        values: (runs, units) float64.
        resamples: number of bootstrap samples.
        seed: of the resampling.
        step: the smallest change of a unit's figure; 0 adds no made-up units.

    Returns:
        The percentile interval; n is the number of true units.

    Raises:
        ValueError: not 2-D, or empty.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be a non-empty 2-D array, got shape {values.shape}.")
    value, true_units = float(values.mean()), values.shape[1]
    if step:
        means = values.mean(1, keepdims=True)
        values = np.concatenate([values, means - step, means + step], axis=1)
    runs, units = values.shape
    rng = np.random.default_rng(seed)
    run_weights = rng.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs
    unit_weights = rng.multinomial(units, np.full(units, 1 / units), resamples) / units
    means = np.einsum("br,rp,bp->b", run_weights, values, unit_weights)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(value, float(low), float(high), true_units)


def clustered_share(values: np.ndarray, resamples: int = 2000, seed: int = 0, step: float = 0.0) -> Estimate:
    """``clustered_mean`` of shares: the interval does not leave 0 to 1."""
    found = clustered_mean(values, resamples, seed, step)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _codes(labels: Sequence[object] | np.ndarray, size: int, name: str) -> np.ndarray:
    """Number the clusters: (n,) int64 codes from 0."""
    labels = np.asarray(labels)
    if labels.shape != (size,):
        raise ValueError(f"{name} must hold one label per value: {size} values and shape {labels.shape} given.")
    return np.unique(labels, return_inverse=True)[1]


def cluster_bootstrap_mean(
    values: np.ndarray, *clusters: Sequence[object] | np.ndarray, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Mean of figures that come in clusters (cells of an image, images of a class), by resampling whole clusters.

    With several label arrays (image and class, say) each is resampled by itself and an observation weighs the product
    of its clusters' draws: the pigeonhole bootstrap (Owen 2007), which is valid for crossed clusters and errs on the
    wide side. The interval collapses to a point where all figures agree; see ``cluster_proportion`` for shares.

    Args:
        values: (n,) floats or booleans.
        clusters: one or more (n,) label arrays.
        seed: of the resampling.
        resamples: number of bootstrap samples; those that draw no observation are left out.

    Returns:
        The percentile interval of the mean over observations; n is the smallest number of clusters.

    Raises:
        ValueError: no values or no clusters, or the lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values must be a non-empty 1-D array, got shape {values.shape}.")
    if not clusters:
        raise ValueError("clusters must name at least one label array; without one use bootstrap_mean.")
    codes = [_codes(labels, values.size, "clusters") for labels in clusters]
    counts = [int(code.max()) + 1 for code in codes]
    rng = np.random.default_rng(seed)
    draws = [rng.multinomial(count, np.full(count, 1 / count), resamples) for count in counts]
    sums, sizes = np.zeros(resamples), np.zeros(resamples)
    for sample in range(resamples):  # one at a time: n weights in memory, not resamples x n
        weights = np.prod([draw[sample][code] for draw, code in zip(draws, codes, strict=True)], axis=0)
        sums[sample], sizes[sample] = weights @ values, weights.sum()
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(sums[sizes > 0] / sizes[sizes > 0], [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high), min(counts))


def cluster_proportion(correct: np.ndarray, clusters: Sequence[object] | np.ndarray) -> Estimate:
    """Share of successes that come in clusters: Wilson's interval at the effective sample size.

    The effective size is p (1 - p) / v, with v the linearised variance of the ratio of cluster sums, and never above
    the number of observations. Where all observations agree it is the number of clusters, so the interval never
    collapses to a point.

    Args:
        correct: (n,) booleans.
        clusters: (n,) labels.

    Returns:
        n is the number of clusters.

    Raises:
        ValueError: empty, not 1-D, not binary, or the lengths differ.
    """
    correct = _check_binary(correct, "correct")
    codes = _codes(clusters, correct.size, "clusters")
    sizes = np.bincount(codes)
    share, count = float(correct.mean()), sizes.size
    effective = float(count)
    if 0 < share < 1 and count > 1:
        residuals = np.bincount(codes, weights=correct) - share * sizes
        variance = count / (count - 1) * float(residuals @ residuals) / correct.size**2
        effective = min(share * (1 - share) / variance, correct.size) if variance else float(correct.size)
    z = _normal_quantile()
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
    # rounding must not leave the estimate outside of its interval
    return Estimate(share, float(np.clip(centre - half, 0, share)), float(np.clip(centre + half, share, 1)), count)
