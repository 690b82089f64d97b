"""E3 and E4: do the differences of two objects' states carry their relation, in which geometry, and since when?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dualstream.eval.statistics import Estimate, bootstrap_mean, cluster_proportion

from . import relation_figures
from .bench import NEUTRAL_PROMPT
from .experiment import Experiment, Finding, ReportTable, above, below, pending
from .items import REFERENCE, ROLES, SUBJECT
from .relation_measures import (
    axis_differences,
    crossing,
    mean_separation,
    noise_tokens,
    opposition,
    published_cluster_agreement,
    published_geometry_score,
    separation,
    shared_direction,
)
from .relation_probes import (
    correct_of_axis,
    correct_of_four,
    object_disjoint_folds,
    permuted_labels,
    probe_scores,
    without_place,
)
from .states import CONNECTOR, LLM, VISION, Place, all_places, read_pictures

if TYPE_CHECKING:
    from dualstream.analysis.resumable_rows import ResumableRows

    from .bench import Bench
    from .items import ObjectPair

PROBED = ("A - B", "A alone", "A alone without its place", "B alone")
PERMUTED, PLACES_ONLY = "A - B, relations renamed at random", "A's place alone (no model)"
RENAMINGS = 3
CLUSTERED = 12  # pairs that the published clustering is replayed on
CHANCE, AXIS_CHANCE, ORTHOGONAL, SHARED = 0.25, 0.5, 0.2, 0.5
WRONG_ORDER = [0, 2, 1, 3]  # "left" opposite to "high"
NOT_PROBED = ReportTable(
    "Probes", (), [], "Too few pairs for splits into training and test pairs without a common object."
)
STILL, MOVING = "A stands still", "A moves"


class RelationVectors(Experiment):
    """Relation vectors and cross-pair probes."""

    name = "relation_vectors"
    title = "E3, E4: relation vectors"
    question = (
        "v = mean state of object A's tokens minus that of B's, for the four relations of a pair. Are v of opposite "
        "relations opposite and those of the two axes orthogonal, is a direction shared by pairs of other objects, "
        "and how much of it does the absolute place of A alone explain? The published measures stand beside what "
        "they give for wrong pairings and for pure noise."
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._known: tuple[pa.Table, Study] | None = None  # findings, tables and figures share the probes

    def _study(self, table: pa.Table) -> Study:
        if self._known is None or self._known[0] is not table:
            self._known = (table, Study(table))
        return self._known[1]

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """See ``Experiment``; a unit is a pair."""
        places = all_places(bench)
        by_id = {pair.pair_id: pair for pair in bench.pairs}
        clustered = set(list(by_id)[:CLUSTERED])
        for unit in pending(list(by_id), rows, self.title):
            rows.write(unit, list(pair_rows(bench, by_id[unit], places, unit in clustered)))

    def summarize(self, table: pa.Table) -> list[Finding]:
        """See ``Experiment``: at the connector's input and output and at the language model's end."""
        study = self._study(table)
        findings: list[Finding] = []
        for number in study.key_places():
            findings += geometry_findings(study, number)
        for number in study.key_places() if study.is_probed else []:
            findings += probe_findings(study, number)
        return findings

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """See ``Experiment``."""
        study = self._study(table)
        probes = [probe_table(study), shortcut_table(study)] if study.is_probed else [NOT_PROBED]
        return [geometry_table(study), published_table(study), *probes]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """See ``Experiment``."""
        return relation_figures.draw(self._study(table), folder)


def pair_rows(bench: Bench, pair: ObjectPair, places: Sequence[Place], clusters: bool) -> Iterator[dict[str, Any]]:
    """One row per place: the mean states of A and B in the four pictures, and measures that need single tokens."""
    tokens = [[bench.tokens(item, role) for role in ROLES] for item in pair.items]
    states = []
    for batch in bench.batches(pair.items):
        states += read_pictures(bench, [item.image() for item in batch], NEUTRAL_PROMPT, places)
    rng = np.random.default_rng([bench.seed, *pair.pair_id.encode()])
    for place in places:
        groups = [
            [each[place].numpy()[chosen].astype(np.float64) for each, chosen in zip(states, own, strict=True)]
            for own in zip(*tokens, strict=True)
        ]
        means = [np.stack([group.mean(0) for group in role]) for role in groups]
        yield {
            "pair_id": pair.pair_id,
            "number": place.number,
            "stage": place.stage,
            "depth": place.depth,
            "relations": list(pair.relations),
            "kinds": list(pair.kinds),
            "anchors": [item.anchor for item in pair.items],
            "a": means[0].astype(np.float32).ravel(),
            "b": means[1].astype(np.float32).ravel(),
            "centres": [value for item in pair.items for role in ROLES for value in _centre(bench, item, role)],
            "tokens_a": [len(each[0]) for each in tokens],
            "tokens_b": [len(each[1]) for each in tokens],
            **noise_measures(groups, rng, clusters and place.stage == CONNECTOR),
        }


def noise_measures(groups: Sequence[Sequence[np.ndarray]], rng: np.random.Generator, clusters: bool) -> dict[str, Any]:
    """Measures of tokens that were all drawn from one distribution, with the mean and spread of the real ones."""
    every = np.concatenate([tokens for role in groups for tokens in role])
    drawn = [noise_tokens([len(t) for t in role], every.mean(0), every.std(0), rng) for role in groups]
    vectors = np.stack([a.mean(0) - b.mean(0) for a, b in zip(*drawn, strict=True)])
    return {
        "noise_separation": float(separation(vectors)),
        "noise_crossing": float(abs(crossing(vectors))),
        "noise_score": published_geometry_score(vectors),
        "agreement": published_cluster_agreement(groups[0], groups[1]) if clusters else None,
        "noise_agreement": published_cluster_agreement(drawn[0], drawn[1]) if clusters else None,
    }


def _centre(bench: Bench, item: Any, role: str) -> tuple[float, float]:
    x1, y1, x2, y2 = item.object(role).box
    width, height = bench.size(item)
    return (x1 + x2) / 2 / width, (y1 + y2) / 2 / height


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
        return len(tested) >= max(2, len(self.kinds) // 2)

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

    def anchored_accuracy(self, number: int, feature: str, still: bool) -> Estimate | None:
        """Right against opposite on the axis where A stands still (or moves); None if the source has no such axis."""
        scores = self.scores(number, feature)[0]
        chosen = (self.anchors == (SUBJECT if still else REFERENCE)) & ~np.isnan(scores).any((1, 2))[:, None]
        if not chosen.any():
            return None
        names = np.repeat(np.array(self.pair_ids)[:, None], 4, axis=1)
        return cluster_proportion(correct_of_axis(scores)[chosen], names[chosen])

    def _share(self, scores: np.ndarray, namings: np.ndarray) -> Estimate:
        tested = ~np.isnan(scores).any((0, 2, 3))
        correct = correct_of_four(scores[:, tested], namings[:, tested])
        names = np.broadcast_to(np.array(self.pair_ids)[tested][None, :, None], correct.shape)
        return cluster_proportion(correct.ravel(), names.ravel())


def geometry_findings(study: Study, number: int) -> list[Finding]:
    """Opposition, orthogonality and a shared direction at one place."""
    vectors, name = study.vectors(number), study.name(number)
    noise = "tokens drawn from one distribution"
    apart, cross = _mean_separation(vectors), bootstrap_mean(np.abs(crossing(vectors)))
    shared = bootstrap_mean(_shared(vectors).mean(0))
    wrong = bootstrap_mean(_shared(_renamed(vectors)).mean(0))
    return [
        Finding(
            f"In {name}, mean vectors of opposite relations are more opposite than wrongly paired ones.",
            apart,
            above(apart, 0),
            "yes: interval above 0; no: below 0 (1: perfect, -0.5: wrongly paired)",
            _mean_separation(_renamed(vectors)),
            "relations renamed at random",
            "separation",
        ),
        Finding(
            f"In {name}, the horizontal and the vertical direction of a pair are orthogonal.",
            cross,
            below(cross, ORTHOGONAL),
            f"yes: interval of the mean absolute cosine below {ORTHOGONAL}; no: above it",
            bootstrap_mean(study.column(number, "noise_crossing")),
            noise,
            "cosine",
        ),
        Finding(
            f"In {name}, pairs of other objects share one direction per axis.",
            shared,
            above(shared, SHARED),
            f"yes: interval of the mean cosine between pairs above {SHARED}; no: below it",
            wrong,
            "relations renamed at random",
            "cosine",
        ),
    ]


def probe_findings(study: Study, number: int) -> list[Finding]:
    """What can be decoded at one place for objects that the probe never saw."""
    name, chance = study.name(number), f"yes: interval above {CHANCE:.2f}; no: below it"
    both, alone = study.accuracy(number, "A - B"), study.accuracy(number, "A alone")
    findings = [
        Finding(
            f"In {name}, A - B tells the relation of objects that the probe never saw.",
            both,
            above(both, CHANCE),
            chance,
            study.renamed_accuracy(number),
            "relations renamed at random",
            "accuracy",
        ),
        Finding(
            f"In {name}, A alone tells it too (the shortcut by absolute place).",
            alone,
            above(alone, CHANCE),
            chance,
            study.accuracy(number, PLACES_ONLY),
            PLACES_ONLY,
            "accuracy",
        ),
    ]
    still = study.anchored_accuracy(number, "A alone", still=True)
    if still is not None:
        findings.append(
            Finding(
                f"In {name}, A alone tells right from opposite even where A stands at one place in both pictures.",
                still,
                above(still, AXIS_CHANCE),
                f"yes: interval above {AXIS_CHANCE:.2f}; no: below it",
                study.anchored_accuracy(number, PLACES_ONLY, still=True),
                PLACES_ONLY,
                "accuracy",
            )
        )
    return findings


def geometry_table(study: Study) -> ReportTable:
    """Separation, crossing and shared directions along the way."""
    table = ReportTable(
        "Geometry of the relation vectors",
        (
            "place",
            "separation of the mean vectors",
            "of single pairs",
            "noise",
            "|cos| of the axes",
            "noise",
            "shared, horizontal",
            "shared, vertical",
        ),
        note="Separation: 1 if opposites are opposite and axes orthogonal, 0 without order, -0.5 if wrongly paired. "
        "In a single pair the two pictures of an axis share the place of the object that stands still, which makes "
        "left and right alike; over different pairs that goes out, so the statements are about the mean vectors. "
        "Shared: mean cosine of a pair's left - right (high - low) with those of pairs of other objects.",
    )
    for number, _, _ in study.places:
        vectors, shared = study.vectors(number), _shared(study.vectors(number))
        table.rows.append(
            (
                study.name(number),
                _mean_separation(vectors),
                bootstrap_mean(separation(vectors)),
                float(study.column(number, "noise_separation").mean()),
                bootstrap_mean(np.abs(crossing(vectors))),
                float(study.column(number, "noise_crossing").mean()),
                bootstrap_mean(shared[0]),
                bootstrap_mean(shared[1]),
            )
        )
    return table


def published_table(study: Study) -> ReportTable:
    """The published measures beside what they give where there is nothing."""
    table = ReportTable(
        "The published measures, and what they are worth",
        ("place", "geometry score", "left paired with high", "noise", "-cos without centring", "ARI", "ARI of noise"),
        note="The geometry score is 1 for any four vectors of one length, so it cannot say no; the adjusted Rand "
        "index finds four pictures, not four relations. Without centring, vectors show what the objects look like.",
    )
    for number, _, _ in study.places:
        vectors = study.vectors(number)
        agreement, noise_agreement = (study.column(number, name) for name in ("agreement", "noise_agreement"))
        clustered = ~np.isnan(agreement)
        table.rows.append(
            (
                study.name(number),
                bootstrap_mean(np.array([published_geometry_score(v) for v in vectors])),
                bootstrap_mean(np.array([published_geometry_score(v) for v in vectors[:, WRONG_ORDER]])),
                bootstrap_mean(study.column(number, "noise_score")),
                bootstrap_mean(opposition(vectors)),
                bootstrap_mean(agreement[clustered]) if clustered.any() else None,
                bootstrap_mean(noise_agreement[clustered]) if clustered.any() else None,
            )
        )
    return table


def probe_table(study: Study) -> ReportTable:
    """Accuracy of the probes along the way."""
    table = ReportTable(
        "Relation decoded for objects that the probe never saw (four relations, chance 0.25)",
        ("place", *PROBED, PERMUTED),
        note=f"{PLACES_ONLY}: {_text(study.accuracy(study.places[0][0], PLACES_ONLY))}. Without its place: minus what "
        "a quadratic function of A's own place predicts.",
    )
    for number, _, _ in study.places:
        accuracies = [study.accuracy(number, feature) for feature in PROBED]
        table.rows.append((study.name(number), *accuracies, study.renamed_accuracy(number)))
    return table


def shortcut_table(study: Study) -> ReportTable:
    """A alone, on the axis on which it stands still and on the one on which it moves."""
    table = ReportTable(
        "A alone: right against opposite (chance 0.5), by whether A moves between the two pictures",
        ("place", STILL, MOVING),
        note="Where A stands still its own place tells nothing: what A's state says of the relation it has from B.",
    )
    for number, _, _ in study.places:
        still, moving = (study.anchored_accuracy(number, "A alone", value) for value in (True, False))
        if still is not None:
            table.rows.append((study.name(number), still, moving))
    if not table.rows:
        return ReportTable(table.title, table.columns, [], "The source has no pairs of pictures with A at one place.")
    return table


def _shared(vectors: np.ndarray) -> np.ndarray:
    """(2, pairs): mean cosine of a pair's axis difference with the other pairs', for the two axes."""
    differences = axis_differences(vectors)
    return np.stack([shared_direction(differences[:, axis]) for axis in (0, 1)])


def _mean_separation(vectors: np.ndarray) -> Estimate:
    return Estimate(*mean_separation(vectors), len(vectors))


def _renamed(vectors: np.ndarray) -> np.ndarray:
    order = permuted_labels(len(vectors), 0)
    return np.take_along_axis(vectors, order[:, :, None], axis=1)


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
