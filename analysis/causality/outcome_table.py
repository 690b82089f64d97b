"""Figures of conditions against the plain model on the same pictures, with intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dualstream.eval.significance import holm, mcnemar_exact, sign_flip_test
from dualstream.eval.statistics import bootstrap_mean, cluster_proportion, clustered_mean, proportion

if TYPE_CHECKING:
    import pandas as pd


def against_baseline(frame: pd.DataFrame, base: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """What a condition does to the answers.

    Args:
        frame: rows of one condition in one setting: ``image``, ``draw``, ``correct``, ``probability``, ``margin``.
        base: rows of the plain model, one per image, index ``image``.
        seed: of bootstraps.

    Returns:
        ``images``; ``accuracy`` over all; ``destroyed``: share answered wrongly of what the plain model answers
        rightly (its n is the number of those images); ``margin_change`` in nats and ``probability``, where the
        setting has them; ``test``: McNemar against the plain model, over the first draw.
    """
    joined = frame.join(base[["correct", "margin"]], on="image", rsuffix="_base")
    right = joined[joined["correct_base"].astype(bool)]
    first = joined[joined["draw"] == joined["draw"].min()] if "draw" in joined else joined
    found: dict[str, Any] = {
        "images": int(joined["image"].nunique()),
        "accuracy": _share(joined["correct"].to_numpy(bool), joined["image"].to_numpy()),
        "destroyed": None,
        "margin_change": None,
        "probability": None,
        "test": mcnemar_exact(first["correct"].to_numpy(bool), first["correct_base"].to_numpy(bool)).to_dict(),
    }
    if len(right):
        wrong = ~right["correct"].to_numpy(bool)
        found["destroyed"] = _share(wrong, right["image"].to_numpy())
    if joined["margin"].notna().all():
        change = (joined["margin"] - joined["margin_base"]).groupby(joined["image"]).mean()
        found["margin_change"] = bootstrap_mean(change.to_numpy(), seed).to_dict()
        probability = joined["probability"].groupby(joined["image"]).mean()
        found["probability"] = bootstrap_mean(probability.to_numpy(), seed).to_dict()
    return found


def paired_destruction(
    treatment: pd.DataFrame, control: pd.DataFrame, base: pd.DataFrame, seed: int = 0
) -> dict[str, Any] | None:
    """By how much more a condition destroys than its control, on the images that the plain model answers rightly.

    Args:
        treatment: rows of a condition.
        control: rows of its control; several draws of an image count as their mean.
        base: rows of the plain model, index ``image``.
        seed: of bootstrap and permutations.

    Returns:
        The difference with its interval over images, and ``p_value`` of a sign-flip test; None where no image has
        both.
    """
    right = base.index[base["correct"].astype(bool)]
    wrong = [1.0 - frame.groupby("image")["correct"].mean() for frame in (treatment, control)]
    shared = wrong[0].index.intersection(wrong[1].index).intersection(right).sort_values()
    if not len(shared):
        return None
    differences = (wrong[0][shared] - wrong[1][shared]).to_numpy(float)
    found = clustered_mean(differences[None], seed=seed, step=1.0).to_dict()
    found |= {"low": max(found["low"], -1.0), "high": min(found["high"], 1.0)}
    return {**found, "p_value": sign_flip_test(differences, seed=seed)}


def add_holm(entries: Sequence[dict[str, Any]], *path: str) -> None:
    """Write ``p_holm`` beside the p-value that lies at a path in every entry, corrected over all of them."""
    places = [entry for entry in entries if _at(entry, path[:-1]) is not None]
    if not places:
        return
    corrected = holm(np.array([_at(entry, path) for entry in places]))
    for entry, value in zip(places, corrected, strict=True):
        _at(entry, path[:-1])["p_holm"] = float(value)


def baseline_of(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of the plain model by image, and its accuracy.

    Args:
        frame: its rows in one setting, one per image.
    """
    base = frame.set_index("image")
    if not base.index.is_unique:
        raise ValueError("the plain model has several rows for one image.")
    return base, {"accuracy": proportion(base["correct"].to_numpy(bool)).to_dict()}


def _share(values: np.ndarray, images: np.ndarray) -> dict[str, Any]:
    """A share with Wilson's interval, by image where an image has several draws."""
    single = len(np.unique(images)) == len(images)
    return (proportion(values) if single else cluster_proportion(values, images)).to_dict()


def _at(entry: dict[str, Any], path: Sequence[str]) -> Any:
    found: Any = entry
    for name in path:
        if found is None:
            return None
        found = found[name]
    return found
