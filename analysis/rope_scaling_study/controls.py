"""Scalings to compare a chosen one with: as large a change, put elsewhere.

All are tables of factors for one tower; g is the chosen scaling's factor per frequency and theta the frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dualstream.modeling import RopeScaling


def tower_frequencies(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """The stock frequencies of a model's vision tower and their ratios 2i/d, each (F) float64.

    Raises:
        ValueError: the model has no tower that can be scaled, or one whose frequencies are no plain list.
    """
    from dualstream.modeling.rope_towers import tower_of, vision_rotaries

    rotary = next(iter(vision_rotaries(model).values()))
    tower = tower_of(rotary)
    if tower is None or tower.form != "axial":
        raise ValueError(f"{type(rotary).__name__}: the study needs a tower with a buffer of frequencies.")
    frequencies = getattr(rotary, tower.buffer).detach().double().cpu().numpy()
    return frequencies, tower.ratios(len(frequencies)).numpy()


def factors_of(scaling: RopeScaling, ratios: np.ndarray) -> np.ndarray:
    """The factor of every frequency, (F) float64, of a scaling that treats scaled axes alike."""
    import torch

    return scaling.factors(torch.as_tensor(ratios))[0, 0].numpy()


def permuted(factors: np.ndarray, draw: int) -> np.ndarray:
    """The same factors at other frequencies; never the order they had, unless all are equal."""
    rng = np.random.default_rng([draw, 1])
    while True:
        shuffled = factors[rng.permutation(len(factors))]
        if not np.array_equal(shuffled, factors) or np.ptp(factors) == 0:
            return shuffled


def random_of_equal_norm(factors: np.ndarray, frequencies: np.ndarray, draw: int) -> np.ndarray:
    """Factors of random size, none below 1, that change the frequencies as much: ``||theta (g - 1)||`` is equal.

    Every frequency gets its share of the change at random, relative to its own size, so that none is favoured.
    """
    share = np.abs(np.random.default_rng([draw, 2]).normal(size=len(factors)))
    change = np.linalg.norm(frequencies * (factors - 1)) / np.linalg.norm(frequencies * share)
    return 1 + change * share


def reversed_factors(factors: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The factors handed out in the opposite order: what the lowest frequency had goes to the highest."""
    order = np.argsort(ratios)
    out = np.empty_like(factors)
    out[order] = factors[order[::-1]]
    return out


def control_settings(
    arm: str, scaling: RopeScaling, others: Mapping[str, RopeScaling], model: Any, draw: int = 0
) -> dict[str, Any] | None:
    """What an arm does to the tower, as settings that ``RopeScaling.from_any`` reads.

    Args:
        arm: one of ``TUNED_ARMS``.
        scaling: the chosen scaling.
        others: ``rebase``, the best ``exp`` of the grid, and ``lowered``, the best scaling that lowers frequencies.
        model: whose tower it is.
        draw: of a random control.

    Returns:
        None for the stock tower.

    Raises:
        ValueError: the arm is unknown.
    """
    if arm == "stock":
        return None
    if arm == "scaled" or arm in others:
        return (scaling if arm == "scaled" else others[arm]).to_dict()
    if arm in ("h-only", "w-only"):
        return replace(scaling, axes=arm[0]).to_dict()
    if arm == "table":
        start = {"alpha": scaling.alpha, "p": scaling.p} if scaling.type == "poly" else {"alpha": 0.0, "p": 8.0}
        return {"type": "table", "learned": True, **start}
    frequencies, ratios = tower_frequencies(model)
    factors = factors_of(scaling, ratios)
    if arm == "permuted":
        values = permuted(factors, draw)
    elif arm == "random":
        values = random_of_equal_norm(factors, frequencies, draw)
    elif arm == "high-frequency":
        values = reversed_factors(factors, ratios)
    else:
        raise ValueError(f"arm={arm!r} is unknown.")
    return {"type": "table", "values": values.tolist()}
