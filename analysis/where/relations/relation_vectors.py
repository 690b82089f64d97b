"""E3 and E4: do the differences of two objects' states carry their relation, in which geometry, and since when?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..bench import NEUTRAL_PROMPT
from ..experiment import Experiment, Finding, ReportTable, pending
from ..items import ROLES
from ..states import CONNECTOR, Place, all_places, read_pictures
from . import relation_figures, relation_report
from .relation_measures import (
    crossing,
    noise_tokens,
    published_cluster_agreement,
    published_geometry_score,
    separation,
)
from .relation_study import Study

if TYPE_CHECKING:
    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench
    from ..items import ObjectPair

CLUSTERED = 12  # pairs that the published clustering is replayed on


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
        return relation_report.findings(self._study(table))

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """See ``Experiment``."""
        return relation_report.tables(self._study(table))

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
