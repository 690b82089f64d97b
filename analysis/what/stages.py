"""Two stages of seeing (section 3.2 of arXiv 2509.19191): do attributes come first, and objects' names after them?

For an object of n cells, a of which say one of its attributes and c one of its names (an attribute if both),
r_A = a / n and r_R = c / n. All cells of the object count, words are matched as a whole, objects of a picture weigh
the same, and so do pictures. The control gives every object the words of an object of another picture.

``graded`` figures see what top-1 words hide: the log-probability of the object's own attribute (name) minus the mean
of the others of its kind, in nats; 0 for a model that knows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualstream.eval.statistics import Estimate, bootstrap_mean

from .grid_objects import GridObjects

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Ratios:
    """Ratios of one picture by step, (S,) each: own words and those of the control."""

    attribute: np.ndarray
    representative: np.ndarray
    attribute_control: np.ndarray
    representative_control: np.ndarray


def object_ratios(said: np.ndarray, cells: np.ndarray, attributes: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return r_A and r_R of one object.

    Args:
        said: (S, N) words that cells say, -1 for none.
        cells: (N,) bool, cells of the object, at least one.
        attributes: (W,) bool, words for its attributes.
        names: (W,) bool, words for the object itself.

    Returns:
        (2, S) float64.
    """
    inside = said[:, cells]
    as_attribute = np.append(attributes, False)[inside]  # -1 looks up the appended False
    as_name = np.append(names, False)[inside] & ~as_attribute
    return np.stack([as_attribute.mean(1), as_name.mean(1)])


def ratios_with_control(
    said: Sequence[np.ndarray], objects: Sequence[GridObjects], seed: int = 0, draws: int = 5
) -> list[Ratios]:
    """Return the ratios of every picture with a labelled object, and those under words of other pictures' objects.

    Raises:
        ValueError: fewer than two pictures have labelled objects.
    """
    words = [
        (number, item.own_attributes[o], item.own_names[o])
        for number, item in enumerate(objects)
        for o in np.flatnonzero(item.known)
    ]
    if len({number for number, _, _ in words}) < 2:
        raise ValueError("the control needs labelled objects in at least two pictures.")
    owners = np.array([number for number, _, _ in words])
    found = []
    for number, (cells, item) in enumerate(zip(said, objects, strict=True)):
        own = np.flatnonzero(item.known)
        if not len(own):
            continue
        rng = np.random.default_rng([seed, number])
        elsewhere = np.flatnonzero(owners != number)
        true = [object_ratios(cells, item.cells[o], item.own_attributes[o], item.own_names[o]) for o in own]
        drawn = [
            object_ratios(cells, item.cells[o], *words[rng.choice(elsewhere)][1:]) for o in own for _ in range(draws)
        ]
        found.append(Ratios(*np.mean(true, axis=0), *np.mean(drawn, axis=0)))
    return found


def graded(
    tracked: np.ndarray, objects: GridObjects, own: np.ndarray, rivals: Sequence[np.ndarray]
) -> np.ndarray | None:
    """Return how much likelier an object's own words are than the others of their kind.

    Args:
        tracked: (S, N, T) log-probabilities of words.
        objects: the picture's objects.
        own: (O, T) bool, which words are an object's own.
        rivals: (T,) bool per kind; words of a kind exclude each other.

    Returns:
        (S,) mean over objects and kinds, in nats; None if no object has an own word that is tracked.
    """
    values = []
    for number in np.flatnonzero(objects.known):
        mean = tracked[:, objects.cells[number]].mean(1)
        for kind in rivals:
            mine, others = own[number] & kind, ~own[number] & kind
            if mine.any() and others.any():
                values.append(mean[:, mine].mean(1) - mean[:, others].mean(1))
    return np.mean(values, axis=0) if values else None


def change_point(curve: np.ndarray) -> int:
    """Return where a curve changes most: the first index of the second of the two levels that fit it best.

    Args:
        curve: (J,) floats, J >= 2.
    """
    errors = [np.var(curve[:j]) * j + np.var(curve[j:]) * (len(curve) - j) for j in range(1, len(curve))]
    return int(np.argmin(errors)) + 1


def with_interval(curves: np.ndarray, statistic: str, seed: int = 0) -> Estimate:
    """Return a place on the mean curve with a percentile bootstrap interval over pictures.

    Args:
        curves: (pictures, J).
        statistic: ``peak`` (index of the maximum) or ``change`` (``change_point``).
        seed: of the resampling.
    """
    find = {"peak": lambda curve: int(np.argmax(curve)), "change": change_point}[statistic]
    draws = np.random.default_rng(seed).integers(0, len(curves), (RESAMPLES, len(curves)))
    places = [find(curves[chosen].mean(0)) for chosen in draws]
    low, high = np.percentile(places, [2.5, 97.5])
    return Estimate(float(find(curves.mean(0))), float(low), float(high), len(curves))


@dataclass(frozen=True)
class Verdict:
    """What the curves say about two stages.

    Attributes:
        attributes_at_peak: r_A above its control at the peak of that difference, which is found on other pictures.
        fall_of_attributes: r_A above its control, at that peak minus at the native depth.
        rise_of_names: r_R above its control, at the native depth minus at that peak.
        lead: change point of r_R minus peak of r_A, in vision blocks, on the same resampled pictures.
        holds: whether all four are above 0 with their whole interval.
        fails: whether one is at or below 0 with its whole interval.
    """

    attributes_at_peak: Estimate
    fall_of_attributes: Estimate
    rise_of_names: Estimate
    lead: Estimate
    holds: bool
    fails: bool


def judge(
    attribute: np.ndarray, names: np.ndarray, depths: Sequence[int], peak: int, native: int, seed: int = 0
) -> Verdict:
    """Judge the claim of two stages on test pictures.

    Args:
        attribute: (pictures, J) r_A above its control, or graded.
        names: (pictures, J) r_R, likewise.
        depths: the J vision depths, ascending.
        peak: index of the peak of r_A on validation pictures.
        native: index of the native depth.
        seed: of the resampling.
    """
    there = bootstrap_mean(attribute[:, peak], seed)
    fall = bootstrap_mean(attribute[:, peak] - attribute[:, native], seed)
    rise = bootstrap_mean(names[:, native] - names[:, peak], seed)
    draws = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    at = np.asarray(depths)

    def lead(chosen: np.ndarray) -> float:
        return float(at[change_point(names[chosen].mean(0))] - at[int(np.argmax(attribute[chosen].mean(0)))])

    low, high = np.percentile([lead(chosen) for chosen in draws], [2.5, 97.5])
    ahead = Estimate(lead(np.arange(len(names))), float(low), float(high), len(names))
    parts = (there, fall, rise, ahead)
    return Verdict(*parts, all(part.low > 0 for part in parts), any(part.high <= 0 for part in parts))
