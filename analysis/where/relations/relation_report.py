"""Statements and tables about relation vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualstream.eval.statistics import Estimate, bootstrap_mean

from ..experiment import OPEN, YES, Finding, ReportTable, above, below
from .relation_measures import (
    axis_differences,
    crossing,
    mean_separation,
    opposition,
    published_geometry_score,
    separation,
    shared_direction,
)
from .relation_probes import permuted_labels
from .relation_study import PERMUTED, PLACES_ONLY, PROBED, Study

CHANCE, AXIS_CHANCE, ORTHOGONAL, SHARED = 0.25, 0.5, 0.2, 0.5
WRONG_ORDER = [0, 2, 1, 3]  # "left" opposite to "high"
STILL, MOVING = "A stands still", "A moves"
NOT_PROBED = ReportTable(
    "Probes", (), [], "Too few pairs for splits into training and test pairs without a common object."
)


def findings(study: Study) -> list[Finding]:
    """All statements: at the connector's input and output and at the language model's end."""
    stated: list[Finding] = []
    for number in study.key_places():
        stated += geometry_findings(study, number)
    for number in study.key_places() if study.is_probed else []:
        stated += probe_findings(study, number)
    return stated


def tables(study: Study) -> list[ReportTable]:
    """All tables."""
    probes = [probe_table(study), shortcut_table(study)] if study.is_probed else [NOT_PROBED]
    return [geometry_table(study), published_table(study), *probes]


def geometry_findings(study: Study, number: int) -> list[Finding]:
    """Opposition, orthogonality and a shared direction at one place."""
    vectors, name = study.vectors(number), study.name(number)
    noise = "tokens drawn from one distribution"
    apart, cross = _mean_separation(vectors), bootstrap_mean(np.abs(crossing(vectors)))
    shared, wrong = _shared(vectors), _shared(_renamed(vectors))
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
    stated = [
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
    paired = study.paired_accuracy(number, still=True)
    if paired is not None:
        still, by_chance = paired
        told = still.low > AXIS_CHANCE and still.value > by_chance.high
        stated.append(
            Finding(
                f"In {name}, A alone tells opposite pictures apart even where A stands at one place in both.",
                still,
                YES if told else OPEN,
                f"yes: interval above {AXIS_CHANCE:.2f} and value above the range by chance; else open",
                by_chance,
                "range with pictures exchanged at random",
                "accuracy",
            )
        )
    return stated


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
        vectors = study.vectors(number)
        table.rows.append(
            (
                study.name(number),
                _mean_separation(vectors),
                bootstrap_mean(separation(vectors)),
                float(study.column(number, "noise_separation").mean()),
                bootstrap_mean(np.abs(crossing(vectors))),
                float(study.column(number, "noise_crossing").mean()),
                _shared(vectors, [0]),
                _shared(vectors, [1]),
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
        "A alone: which of two opposite pictures is which (chance 0.5), by whether A moves between them",
        ("place", STILL, "range by chance", MOVING, "range by chance"),
        note="By the sign of the agreement of A's difference between the two pictures with those of pairs of other "
        "objects, so what A looks like cannot disturb. Where A stands still its own place tells nothing: what its "
        "state says of the relation it has from B. By chance: the two pictures of pairs exchanged at random.",
    )
    for number, _, _ in study.places:
        still, moving = (study.paired_accuracy(number, value) for value in (True, False))
        if still is not None and moving is not None:
            table.rows.append((study.name(number), *still, *moving))
    if not table.rows:
        return ReportTable(table.title, table.columns, [], "The source has no pairs of pictures with A at one place.")
    return table


def _shared(vectors: np.ndarray, axes: Sequence[int] = (0, 1)) -> Estimate:
    """Mean cosine of the axis differences of different pairs."""
    return Estimate(*shared_direction(axis_differences(vectors)[:, list(axes)]), len(vectors))


def _mean_separation(vectors: np.ndarray) -> Estimate:
    return Estimate(*mean_separation(vectors), len(vectors))


def _renamed(vectors: np.ndarray) -> np.ndarray:
    order = permuted_labels(len(vectors), 0)
    return np.take_along_axis(vectors, order[:, :, None], axis=1)


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
