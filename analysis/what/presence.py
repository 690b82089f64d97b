"""POPE from token maps: is an object there? By vision depth, without asking the model anything.

*Strict*: the best word of some cell names the object; *loose*: one of its three best. Both say "no" to everything
while the reading is noise or punctuation, which is right half of the time on balanced questions; so they are given as
sensitivity and specificity beside the always-no baseline, and a continuous score (the largest log-probability of the
name in any cell) as the area under its ROC curve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from dualstream.eval.statistics import Estimate, cluster_proportion

LOOSE = 3
RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class Answers:
    """Questions of one picture, Q of them, answered at S steps.

    Attributes:
        labels: (Q,) label that is asked for.
        truth: (Q,) bool, whether it is there.
        strict: (S, Q) bool.
        loose: (S, Q) bool.
        score: (S, Q) float, natural logarithm.
    """

    labels: np.ndarray
    truth: np.ndarray
    strict: np.ndarray
    loose: np.ndarray
    score: np.ndarray


def ask(image: str, present: np.ndarray, askable: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw balanced questions: every label that is there, and as many that are not.

    Args:
        image: name of the picture; the draw depends on it and the seed alone.
        present: (P,) labels there.
        askable: (A,) labels that can be asked for.
        seed: of the draw.

    Returns:
        labels (Q,) and truth (Q,); empty where one of the two sides has none.
    """
    there = np.unique(present[np.isin(present, askable)])
    absent = np.setdiff1d(askable, present)
    key = int(hashlib.sha256(f"{seed}-{image}".encode()).hexdigest()[:16], 16)
    rng = np.random.default_rng(key)
    size = min(len(there), len(absent))
    there, absent = rng.permutation(there)[:size], rng.permutation(absent)[:size]
    return np.concatenate([there, absent]), np.arange(2 * size) < size


def answer(said: np.ndarray, log_probs: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> Answers:
    """Answer questions from the readings of a picture.

    Args:
        said: (S, N, k) labels that the k best readings of a cell name, -1 for none; k >= 3.
        log_probs: (S, N, Q) log-probability of each asked label in each cell.
        labels: (Q,) labels asked for.
        truth: (Q,) whether they are there.
    """
    if said.shape[-1] < LOOSE:
        raise ValueError(f"said has {said.shape[-1]} readings per cell; the loose rule needs {LOOSE}.")
    hit = said[:, :, :LOOSE, None] == labels  # (S, N, 3, Q)
    return Answers(labels, truth, hit[:, :, 0].any(1), hit.any((1, 2)), log_probs.max(1))


def auroc(score: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a true item outranks a false one, ties counted as half."""
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        raise ValueError(f"the area needs both answers, got {positive} yes and {negative} no.")
    return float((rankdata(score)[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def presence_figures(answers: Sequence[Answers], seed: int = 0) -> list[dict[str, Any]]:
    """Figures of every step, with intervals over pictures.

    Returns:
        One dict per step: ``strict`` and ``loose``, each with ``sensitivity``, ``specificity``, ``accuracy``;
        ``auroc`` and ``auroc_control`` (truths shuffled among the questions of all pictures).
    """
    answers = [item for item in answers if len(item.truth)]
    if not answers:
        raise ValueError("there are no questions: no picture has both a label that is there and one that is not.")
    truth = np.concatenate([item.truth for item in answers])
    owner = np.concatenate([np.full(len(item.truth), number) for number, item in enumerate(answers)])
    starts = [np.flatnonzero(owner == number) for number in range(len(answers))]
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(truth)
    draws = rng.integers(0, len(answers), (RESAMPLES, len(answers)))
    chosen = [np.concatenate([starts[number] for number in draw]) for draw in draws]
    figures = []
    for step in range(len(answers[0].strict)):
        score = np.concatenate([item.score[step] for item in answers])
        figures.append(
            {
                **{
                    rule: _shares(np.concatenate([getattr(item, rule)[step] for item in answers]), truth, owner)
                    for rule in ("strict", "loose")
                },
                "auroc": _interval(score, truth, chosen, len(answers)),
                "auroc_control": _interval(score, shuffled, chosen, len(answers)),
            }
        )
    return figures


def always_no(answers: Sequence[Answers]) -> float:
    """Accuracy of saying no to everything."""
    return float(1 - np.concatenate([item.truth for item in answers]).mean())


def _shares(said: np.ndarray, truth: np.ndarray, owner: np.ndarray) -> dict[str, Estimate]:
    return {
        "sensitivity": cluster_proportion(said[truth], owner[truth]),
        "specificity": cluster_proportion(~said[~truth], owner[~truth]),
        "accuracy": cluster_proportion(said == truth, owner),
    }


def _interval(score: np.ndarray, truth: np.ndarray, chosen: Sequence[np.ndarray], count: int) -> Estimate:
    values = [auroc(score[c], truth[c]) for c in chosen if 0 < truth[c].sum() < len(c)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(auroc(score, truth), float(low), float(high), count)
