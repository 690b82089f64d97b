"""Rows of the relation vectors as arrays, and the probes that are trained on them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dualstream.eval.statistics import Estimate, cluster_proportion

from ..items import REFERENCE, SUBJECT
from ..states import CONNECTOR, LLM, VISION
from .relation_probes import (
    correct_of_four,
    object_disjoint_folds,
    paired_sides,
    permuted_labels,
    probe_scores,
    without_place,
)

PROBED = ("A - B", "A alone", "A alone without its place", "B alone")
PERMUTED, PLACES_ONLY = "A - B, relations renamed at random", "A's place alone (no model)"
RENAMINGS = 3
EXCHANGES = 500
FEWEST_PAIRS = 8  # to train and test probes on


class Study:
    """The rows as arrays, and what is computed from them, once per place.

    Args:
        table: all rows.
    """

    def __init__(self, table: pa.Table) -> None:
        rows = table.to_pylist()
        self.places = sorted({(row["number"], row["stage"], row["depth"]) for row in rows})
        self._rows = {number: [r for r in rows if r["number"] == number] for number, _, _ in self.places}
        first = self._rows[self.places[0][0]]
        self.pair_ids = [row["pair_id"] for row in first]
        self.kinds = [tuple(row["kinds"]) for row in first]
        self.relations = first[0]["relations"]
        self.anchors = np.array([row["anchors"] for row in first])
        self.centres = np.array([row["centres"] for row in first]).reshape(len(first), 4, 2, 2)
        renamed = [permuted_labels(len(first), seed) for seed in range(RENAMINGS)]
        self.namings = np.stack([np.tile(np.arange(4), (len(first), 1)), *renamed])
        self._scores: dict[tuple[int, str], np.ndarray] = {}

    @property
    def is_probed(self) -> bool:
        """Whether there are pairs enough for training and test pairs without a common object."""
        tested = [index for _, test in object_disjoint_folds(self.kinds) for index in test]
        return len(self.kinds) >= FEWEST_PAIRS and len(tested) >= len(self.kinds) // 2

    def name(self, number: int) -> str:
        """A place in words."""
        _, stage, depth = next(place for place in self.places if place[0] == number)
        if stage == CONNECTOR:
            return "the connector's output"
        return f"the {'vision tower' if stage == VISION else 'language model'} after {depth} blocks"

    def key_places(self) -> list[int]:
        """The connector's input and output, the end of the language model."""
        inner = max(number for number, stage, _ in self.places if stage == VISION)
        connector = next(number for number, stage, _ in self.places if stage == CONNECTOR)
        return [inner, connector, max(number for number, stage, _ in self.places if stage == LLM)]

    def column(self, number: int, name: str) -> np.ndarray:
        """A number of every pair, in the order of ``pair_ids``."""
        return np.array([row[name] for row in self._rows[number]], dtype=np.float64)

    def states(self, number: int, role: str) -> np.ndarray:
        """(pairs, 4, d) mean states of an object."""
        values = np.array([row["a" if role == SUBJECT else "b"] for row in self._rows[number]], dtype=np.float64)
        return values.reshape(len(values), 4, -1)

    def vectors(self, number: int) -> np.ndarray:
        """(pairs, 4, d) relation vectors A - B."""
        return self.states(number, SUBJECT) - self.states(number, REFERENCE)

    def scores(self, number: int, feature: str) -> np.ndarray:
        """(1, pairs, 4, 4) probe scores of a feature; for A - B with those of renamed relations behind them."""
        if (number, feature) not in self._scores:
            namings = self.namings if feature == PROBED[0] else self.namings[:1]
            self._scores[number, feature] = probe_scores(self._feature(number, feature), namings, self.kinds)
        return self._scores[number, feature]

    def _feature(self, number: int, feature: str) -> np.ndarray:
        if feature == "A - B":
            return self.vectors(number)
        if feature == PLACES_ONLY:
            x, y = self.centres[:, :, 0, 0], self.centres[:, :, 0, 1]
            return np.stack([x, y, x * x, y * y, x * y], -1)
        if feature == "A alone without its place":
            return without_place(self.states(number, SUBJECT), self.centres[:, :, 0], self.kinds)
        return self.states(number, SUBJECT if feature == "A alone" else REFERENCE)

    def accuracy(self, number: int, feature: str) -> Estimate:
        """Share of pictures whose relation a probe of a feature gets right."""
        return self._share(self.scores(number, feature)[:1], self.namings[:1])

    def renamed_accuracy(self, number: int) -> Estimate:
        """The same for A - B after the relations of every pair were renamed at random, over several renamings."""
        return self._share(self.scores(number, PROBED[0])[1:], self.namings[1:])

    def paired_accuracy(self, number: int, still: bool) -> tuple[Estimate, Estimate] | None:
        """Which of two opposite pictures is which, by A's states alone, on the axis where A stands still (or moves).

        Args:
            number: of the place.
            still: whether A stands at one place in both pictures of the axis, or B does.

        Returns:
            The share of right pairs, and its mean and 95 % range when the two pictures of pairs are exchanged at
            random; None if the source has no such axis, or too few pairs of other objects.
        """
        states = self.states(number, SUBJECT)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (EXCHANGES, len(states)))
        signs[0] = 1
        names, right = [], []
        for axis in (0, 1):
            chosen = np.flatnonzero(self.anchors[:, 2 * axis] == (SUBJECT if still else REFERENCE))
            if len(chosen):
                differences = (states[:, 2 * axis] - states[:, 2 * axis + 1])[chosen]
                right.append(paired_sides(differences, [self.kinds[index] for index in chosen], signs[:, chosen]))
                names += [self.pair_ids[index] for index in chosen]
        found = np.concatenate(right, axis=1) if right else np.zeros((1, 0))
        known = ~np.isnan(found[0])
        if not known.any():
            return None
        by_chance = found[1:, known].mean(1)
        low, high = np.percentile(by_chance, [2.5, 97.5])
        estimate = cluster_proportion(found[0, known].astype(bool), np.array(names)[known])
        return estimate, Estimate(float(by_chance.mean()), float(low), float(high), int(known.sum()))

    def _share(self, scores: np.ndarray, namings: np.ndarray) -> Estimate:
        tested = ~np.isnan(scores).any((0, 2, 3))
        correct = correct_of_four(scores[:, tested], namings[:, tested])
        names = np.broadcast_to(np.array(self.pair_ids)[tested][None, :, None], correct.shape)
        return cluster_proportion(correct.ravel(), names.ravel())
