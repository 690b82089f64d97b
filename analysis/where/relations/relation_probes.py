"""Linear probes of the relation across object pairs, trained without the objects they are tested on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import numpy as np

GROUPS = 6
ALPHAS = np.logspace(-1, 5, 7)


def object_disjoint_folds(
    kinds: Sequence[tuple[str, str]], groups: int = GROUPS, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Folds in which no object of a test pair occurs in training.

    The objects are dealt to groups; the test pairs of a fold are those within two groups (or one), its training pairs
    those without an object of either. Every pair is tested exactly once.

    Args:
        kinds: the two objects of every pair.
        groups: how many groups; fewer leave less to train on.
        seed: of the dealing.

    Yields:
        Indices of training pairs and of test pairs; neither is empty.
    """
    names = sorted({name for pair in kinds for name in pair})
    random.Random(f"groups-{seed}").shuffle(names)
    group = {name: number % groups for number, name in enumerate(names)}
    of_pair = np.array([sorted((group[a], group[b])) for a, b in kinds])
    for first, second in combinations_with_replacement(range(groups), 2):
        test = (of_pair == (first, second)).all(1)
        train = ~np.isin(of_pair, (first, second)).any(1)
        if test.any() and train.any():
            yield np.flatnonzero(train), np.flatnonzero(test)


def probe_scores(
    features: np.ndarray, labels: np.ndarray, kinds: Sequence[tuple[str, str]], seed: int = 0
) -> np.ndarray:
    """Scores of four relations for every picture, by a ridge classifier that never saw its objects.

    One-against-rest regression on -1 and 1, every output with the penalty that leave-one-out in training favours.

    Args:
        features: (pairs, 4, d), one row per picture.
        labels: (namings, pairs, 4) int, the relation of every picture under several ways to name them, each of which
            gets probes of its own.
        kinds: the two objects of every pair.
        seed: of the folds.

    Returns:
        (namings, pairs, 4, 4) float64: picture, relation; NaN for pairs that no fold could test.
    """
    from sklearn.linear_model import RidgeCV

    namings, pairs, pictures = labels.shape
    targets = 2.0 * (labels[..., None] == np.arange(4)) - 1
    scores = np.full((namings, pairs, pictures, 4), np.nan)
    for train, test in object_disjoint_folds(kinds, seed=seed):
        known, asked = (features[part].reshape(-1, features.shape[-1]) for part in (train, test))
        mean, scale = known.mean(0), known.std(0)
        scale = np.where(scale > 1e-9 * np.abs(mean) + 1e-12, scale, 1.0)
        wanted = np.moveaxis(targets[:, train], 0, 2).reshape(len(known), namings * 4)
        model = RidgeCV(ALPHAS, alpha_per_target=True).fit((known - mean) / scale, wanted)
        found = model.predict((asked - mean) / scale).reshape(len(test), pictures, namings, 4)
        scores[:, test] = np.moveaxis(found, 2, 0)
    return scores


def without_place(
    features: np.ndarray, places: np.ndarray, kinds: Sequence[tuple[str, str]], seed: int = 0
) -> np.ndarray:
    """Features minus what a quadratic function of an object's own place predicts, fitted in the training pairs.

    Args:
        features: (pairs, 4, d).
        places: (pairs, 4, 2), centre of the object in shares of the picture.
        kinds: the two objects of every pair.
        seed: of the folds, as ``probe_scores``.

    Returns:
        (pairs, 4, d); unchanged for pairs that no fold could test.
    """
    x, y = places[..., 0], places[..., 1]
    design = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1)
    left = features.astype(np.float64).copy()
    for train, test in object_disjoint_folds(kinds, seed=seed):
        weights, *_ = np.linalg.lstsq(
            design[train].reshape(-1, 6), features[train].reshape(-1, features.shape[-1]), rcond=None
        )
        left[test] = features[test] - design[test] @ weights
    return left


def correct_of_four(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(pairs, 4) bool: whether the best of four relations is right."""
    return scores.argmax(-1) == labels


def paired_sides(
    differences: np.ndarray, kinds: Sequence[tuple[str, str]], signs: np.ndarray | None = None
) -> np.ndarray:
    """Whether a pair's difference points the way that pairs of other objects say.

    A difference of one object's states in the two pictures of an axis holds nothing of what the object looks like, so
    this finds weaker traces than a probe of single pictures. The answers for different pairs hang together, since
    each is among the others of the rest: what chance gives is found by exchanging the pictures of pairs (`signs`).

    Args:
        differences: (pairs, d), one relation minus its opposite.
        kinds: the two objects of every pair; those that share one with a pair do not count as other.
        signs: (exchanges, pairs) of -1 and 1, None for none.

    Returns:
        (exchanges, pairs) float64: 1 right, 0 wrong, NaN where there is no pair of other objects.
    """
    signs = np.ones((1, len(differences))) if signs is None else signs
    unit = differences / np.maximum(np.linalg.norm(differences, axis=-1, keepdims=True), 1e-12)
    apart = np.array([[not set(own) & set(other) for other in kinds] for own in kinds])
    agreement = signs * (signs @ ((unit @ unit.T) * apart))
    return np.where(apart.any(1), (agreement > 0).astype(float), np.nan)


def permuted_labels(pairs: int, seed: int) -> np.ndarray:
    """(pairs, 4) int: the four relations in a random order in every pair."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(4) for _ in range(pairs)])
