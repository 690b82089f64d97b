"""Tests of paired conditions, correction for many of them, and the number of images that a finding needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm, permutation_test

from .statistics import CONFIDENCE

LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test of two conditions on the same images.

    Attributes:
        gained: images that the treatment alone gets right.
        lost: images that the control alone gets right.
        p_value: two-sided.
        n: number of pairs.
    """

    gained: int
    lost: int
    p_value: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the four numbers as plain JSON values."""
        return asdict(self)


def mcnemar_exact(treatment: np.ndarray, control: np.ndarray) -> PairedTest:
    """Whether two conditions answer the same questions equally often right: McNemar's exact test.

    Given how many pairs disagree, each goes either way with probability one half if the conditions are alike. With no
    disagreement the p-value is 1.

    Args:
        treatment: (n,) booleans.
        control: (n,) booleans in the same order.

    Raises:
        ValueError: shapes differ, or an array is empty, not 1-D or not binary.
    """
    treatment, control = np.asarray(treatment), np.asarray(control)
    if treatment.ndim != 1 or treatment.shape != control.shape or not treatment.size:
        raise ValueError(f"treatment and control must be paired: shapes {treatment.shape} and {control.shape} given.")
    if not (np.isin(treatment, (0, 1)).all() and np.isin(control, (0, 1)).all()):
        raise ValueError("treatment and control must hold only 0/1 or booleans.")
    treatment, control = treatment.astype(bool), control.astype(bool)
    gained, lost = int((treatment & ~control).sum()), int((control & ~treatment).sum())
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedTest(gained, lost, p_value, int(treatment.size))


def sign_flip_test(
    differences: np.ndarray,
    clusters: Sequence[object] | np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 9999,
) -> float:
    """Whether paired differences are centred on 0: the sign-flip permutation test of their mean, two-sided.

    If the two conditions are exchangeable, every difference is as likely with the opposite sign. All sign patterns
    are taken where there are at most ``resamples`` of them, otherwise seeded random ones, with the observed one added
    (so that the p-value is never 0).

    Args:
        differences: (n,) floats, treatment minus control of the same unit.
        clusters: (n,) labels; the differences of a cluster are summed and flip their sign together.
        seed: of the random patterns.
        resamples: number of them.

    Returns:
        The p-value; 1 where at most one difference is not 0.

    Raises:
        ValueError: empty, not 1-D, not finite, or ``clusters`` has another length.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(f"differences must be a non-empty 1-D array of finite numbers, got {differences!r}.")
    if clusters is not None:
        labels = np.asarray(clusters)
        if labels.shape != differences.shape:
            raise ValueError(f"clusters must hold {differences.size} labels, got shape {labels.shape}.")
        differences = np.bincount(np.unique(labels, return_inverse=True)[1], weights=differences)
    differences = differences[differences != 0]  # flipping a 0 changes nothing
    if differences.size < 2:  # one difference is as large either way
        return 1.0
    found = permutation_test(
        (differences,),
        lambda values, axis: values.sum(axis=axis),
        vectorized=True,
        permutation_type="samples",
        n_resamples=resamples,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: np.ndarray | Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: p-values that bound the chance of any false finding in the table.

    Args:
        p_values: array of any shape (a table of windows and routes, say), all in [0, 1].

    Returns:
        Adjusted p-values of the same shape; reject those at or below the level.

    Raises:
        ValueError: empty, or a value is not in [0, 1].
    """
    table = np.asarray(p_values, dtype=np.float64)
    flat = table.ravel()
    if not flat.size or not ((flat >= 0) & (flat <= 1)).all():
        raise ValueError("p_values must be a non-empty array of numbers in [0, 1].")
    order = np.argsort(flat, kind="stable")
    steps = np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1))
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.reshape(table.shape)


def _check_rates(lost: float, gained: float) -> None:
    if not (0 <= lost <= 1 and 0 <= gained <= 1 and lost + gained <= 1 + 1e-9):
        raise ValueError(f"lost and gained must be shares of all pairs with a sum of at most 1, got {lost}, {gained}.")


def mcnemar_power(n: int, lost: float, gained: float = 0.0, level: float = LEVEL) -> float:
    """Chance that McNemar's exact test finds a difference, over all numbers of disagreeing pairs.

    Args:
        n: number of pairs (images).
        lost: share of images that the treatment turns from right to wrong.
        gained: share that it turns from wrong to right.
        level: of the test, two-sided; divide by the number of tests for a whole table.

    Returns:
        The power, 0 to 1; at equal shares it is the test's true size, at most ``level``.

    Raises:
        ValueError: ``n`` is below 1 or the shares are no shares.
    """
    _check_rates(lost, gained)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1.")
    if lost + gained == 0:
        return 0.0
    disagreeing = np.arange(n + 1)
    critical = binom.ppf(level / 2, disagreeing, 0.5) - 1  # the most right-going pairs that still reject ...
    critical += binom.cdf(critical + 1, disagreeing, 0.5) <= level / 2  # ... ppf may overshoot by one
    share = lost / (lost + gained)
    rejected = binom.cdf(critical, disagreeing, share) + binom.sf(disagreeing - critical - 1, disagreeing, share)
    return float(binom.pmf(disagreeing, n, min(lost + gained, 1)) @ np.minimum(rejected, 1.0))


def images_needed(
    lost: float, gained: float = 0.0, power: float = 0.8, level: float = LEVEL, largest: int = 100_000
) -> int:
    """Smallest number of images with which McNemar's exact test finds a difference with the power asked for.

    The power of an exact test goes up in a saw-tooth; the number returned is the first from which on the next 20 all
    reach it.

    Args:
        lost: share of images turned from right to wrong.
        gained: share turned from wrong to right, another than ``lost``.
        power: chance of finding it, in (0, 1).
        level: of the test, two-sided.
        largest: where to give up.

    Raises:
        ValueError: the shares are equal, ``power`` is no such chance, or more than ``largest`` images are needed.
    """
    _check_rates(lost, gained)
    if lost == gained:
        raise ValueError(f"lost and gained are both {lost}: there is no difference to find.")
    if not level < power < 1:
        raise ValueError(f"power={power} must lie between level={level} and 1.")

    def enough(n: int) -> bool:
        return mcnemar_power(n, lost, gained, level) >= power

    top = 8
    while not enough(top):
        top *= 2
        if top > largest:
            raise ValueError(f"more than largest={largest} images are needed for lost={lost}, gained={gained}.")
    start = max(top // 2 - 20, 1)
    run = 0
    for n in range(start, top + 21):
        run = run + 1 if enough(n) else 0
        if run == 20 or n == top + 20:
            return n - run + 1
    raise AssertionError("unreachable: top + 20 ends the loop")


def smallest_loss_found(n: int, gained: float = 0.0, power: float = 0.8, level: float = LEVEL) -> float:
    """Smallest share of images turned wrong that McNemar's exact test finds with the power asked for.

    Args:
        n: number of pairs (images).
        gained: share that goes the other way.
        power: chance of finding it.
        level: of the test, two-sided.

    Returns:
        The share; NaN where not even the loss of all other images would be found.
    """
    most = 1.0 - gained
    if mcnemar_power(n, most, gained, level) < power:
        return float("nan")
    return float(brentq(lambda lost: mcnemar_power(n, lost, gained, level) - power, gained, most, xtol=1e-5))


def images_for_half_width(half_width: float, share: float = 0.5) -> int:
    """Smallest number of images that gives Wilson's interval a half-width of at most ``half_width``.

    Args:
        half_width: in (0, 0.5).
        share: the share expected; 0.5 needs the most images.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (0 < half_width < 0.5 and 0 <= share <= 1):
        raise ValueError(f"half_width={half_width} must be in (0, 0.5) and share={share} in [0, 1].")
    z = norm.ppf((1 + CONFIDENCE) / 2)

    def half(n: float) -> float:
        return z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))

    return int(np.ceil(brentq(lambda n: half(n) - half_width, 1e-9, (z / half_width) ** 2 + 10) - 1e-9))
