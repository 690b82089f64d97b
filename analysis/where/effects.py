"""Paired differences between conditions on the same pictures, clustered by object pair, many of them at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.eval.significance import LEVEL, holm, sign_flip_test
from dualstream.eval.statistics import Estimate, clustered_mean

from .experiment import NO, OPEN, YES

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

ITEMS_PER_PAIR = 4
POINTS = 100.0  # shares are shown in percentage points
SMALLEST_CHANGE = POINTS / ITEMS_PER_PAIR  # of a pair's accuracy
FLIPS = 4999


@dataclass(frozen=True)
class Effect:
    """A paired difference.

    Attributes:
        estimate: mean over pictures with its interval over object pairs.
        p_value: of the sign-flip test over pairs, two-sided.
        corrected: the same after Holm's correction over the family of comparisons it was made in.
    """

    estimate: Estimate
    p_value: float
    corrected: float = float("nan")

    def is_above(self, bound: float = 0.0) -> bool:
        """Whether the interval lies above a bound and, after correction, chance is no explanation."""
        return self.estimate.low > bound and not self.corrected > LEVEL

    def is_below(self, bound: float = 0.0) -> bool:
        """Whether the interval lies below a bound and, after correction, chance is no explanation."""
        return self.estimate.high < bound and not self.corrected > LEVEL


def effect(values: ArrayLike, pairs: ArrayLike, step: float = 0.0, seed: int = 0) -> Effect:
    """Mean of paired differences.

    Args:
        values: one difference per picture, finite.
        pairs: the object pair of each picture.
        step: smallest change of a pair's mean; keeps the interval from collapsing where all pairs agree.
        seed: of the resampling.
    """
    codes = np.unique(np.asarray(pairs), return_inverse=True)[1]
    means = np.bincount(codes, weights=np.asarray(values, dtype=np.float64)) / np.bincount(codes)
    estimate = clustered_mean(means[None], seed=seed, step=step)
    return Effect(estimate, sign_flip_test(means, seed=seed, resamples=FLIPS))


def rate(values: ArrayLike, pairs: ArrayLike) -> Estimate:
    """Mean of a share in percent (0 or 100 per picture); the interval stays within 0 to 100."""
    found = effect(values, pairs, SMALLEST_CHANGE).estimate
    return replace(found, low=max(found.low, 0.0), high=min(found.high, POINTS))


def corrected(effects: Mapping[Any, Effect]) -> dict[Any, Effect]:
    """Correct the p-values of a family of comparisons (Holm)."""
    if not effects:
        return {}
    adjusted = holm([each.p_value for each in effects.values()])
    return {
        name: replace(each, corrected=float(value))
        for (name, each), value in zip(effects.items(), adjusted, strict=True)
    }


def judged_below(found: Effect, tolerance: float) -> str:
    """``yes`` if the effect is a loss, ``no`` if the interval excludes a loss beyond a tolerance, else ``open``."""
    if found.is_below():
        return YES
    return NO if found.estimate.low > -tolerance else OPEN


def judged_above(found: Effect, tolerance: float = 0.0) -> str:
    """``yes`` if the effect is a gain, ``no`` if the interval excludes a gain beyond a tolerance, else ``open``."""
    if found.is_above():
        return YES
    return NO if found.estimate.high < tolerance or (tolerance == 0 and found.estimate.high <= 0) else OPEN


def on_items(frame: pd.DataFrame, column: str, **wanted: Any) -> pd.Series:
    """One column of the rows that match, by picture.

    Raises:
        ValueError: a picture has several such rows.
    """
    rows = frame
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    if rows["item"].duplicated().any():
        raise ValueError(f"{wanted} does not single out one row per picture.")
    return rows.set_index("item")[column]


def pair_of_item(frame: pd.DataFrame) -> pd.Series:
    """The object pair of every picture, by picture."""
    return frame.drop_duplicates("item").set_index("item")["pair_id"]


def option_margin(log_likelihoods: np.ndarray, answers: Sequence[int]) -> np.ndarray:
    """Log-probability of the right option minus that of the best other one, (n,) in nats."""
    table = np.array(log_likelihoods, dtype=np.float64)
    rows = np.arange(len(table))
    right = table[rows, list(answers)]
    table[rows, list(answers)] = -np.inf
    return right - table.max(1)
