"""E3 and E4 from rows to statements, on states whose geometry is known."""

import json

import numpy as np
import pyarrow as pa
import pytest

from dualstream.analysis.where.relations.relation_study import PLACES_ONLY, Study
from dualstream.analysis.where.relations.relation_vectors import RelationVectors, noise_measures

WIDTH, PLACES = 48, [(0, "vision", 0), (1, "vision", 3), (2, "connector", 0), (3, "llm", 1)]


def rows_of(pairs=40, signal=1.0, seed=0):
    """A and B carry what they look like and, with `signal`, half of the relation each, except at depth 0."""
    rng = np.random.default_rng(seed)
    h, v = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T
    relation = np.stack([h, -h, v, -v])
    names = [f"thing {number}" for number in range(14)]
    rows = []
    for pair in range(pairs):
        kinds = [str(name) for name in rng.choice(names, 2, replace=False)]
        looks = rng.normal(size=(2, WIDTH)) / np.sqrt(WIDTH)
        anchors = ["subject", "subject", "reference", "reference"] if pair % 2 else ["reference"] * 2 + ["subject"] * 2
        for number, stage, depth in PLACES:
            part = (0.0 if number == 0 else signal) * relation / 2
            a, b = looks[0] + part, looks[1] - part
            rows.append(
                {
                    "pair_id": f"pair {pair:02d}",
                    "number": number,
                    "stage": stage,
                    "depth": depth,
                    "relations": ["left", "right", "above", "below"],
                    "kinds": kinds,
                    "anchors": anchors,
                    "a": (a + 0.02 * rng.normal(size=a.shape)).astype("f4").ravel(),
                    "b": (b + 0.02 * rng.normal(size=b.shape)).astype("f4").ravel(),
                    "centres": rng.uniform(size=16),
                    "tokens_a": [2] * 4,
                    "tokens_b": [2] * 4,
                    "noise_separation": 0.01 * rng.normal(),
                    "noise_crossing": 0.1,
                    "noise_score": 1.0,
                    "agreement": 1.0 if stage == "connector" and pair < 3 else None,
                    "noise_agreement": 1.0 if stage == "connector" and pair < 3 else None,
                }
            )
    return rows


def test_statements_about_states_with_a_relation(tmp_path):
    experiment, table = RelationVectors(), pa.Table.from_pylist(rows_of())
    by_text = {finding.statement: finding for finding in experiment.summarize(table)}
    assert len(by_text) == 3 * 3 + 3 * 3
    for text, finding in by_text.items():
        json.dumps(finding.to_dict(), allow_nan=False)
        wanted = ("opposite relations", "orthogonal", "share one direction", "A - B tells", "even where A stands")
        if any(part in text for part in wanted):
            assert finding.verdict == "yes", text
    assert len(experiment.tables(table)) == 4
    for shown in experiment.tables(table):
        assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert all(path.is_file() for path in experiment.figures(table, tmp_path))


def test_statements_about_states_without_one():
    findings = RelationVectors().summarize(pa.Table.from_pylist(rows_of(signal=0.0)))
    for finding in findings:
        if "orthogonal" not in finding.statement:
            assert finding.verdict != "yes", finding.statement


def test_probes_by_place_and_anchor():
    study = Study(pa.Table.from_pylist(rows_of()))
    assert study.is_probed and study.key_places() == [1, 2, 3]
    assert study.accuracy(0, "A - B").high < 0.5 < study.accuracy(1, "A - B").low
    assert study.accuracy(1, PLACES_ONLY).high < 0.5  # the places are random here
    assert study.renamed_accuracy(1).high < 0.45
    for still in (True, False):
        found, by_chance = study.paired_accuracy(1, still)
        assert found.value == 1 and found.n == by_chance.n == 40 and by_chance.high < 0.9
        found, by_chance = study.paired_accuracy(0, still)  # depth 0 holds no relation here
        assert by_chance.low - 0.1 <= found.value <= by_chance.high + 0.1 < 0.9


def test_a_handful_of_pairs_is_not_probed():
    experiment, table = RelationVectors(), pa.Table.from_pylist(rows_of(2))
    findings = experiment.summarize(table)
    assert len(findings) == 9 and not Study(table).is_probed
    assert "Too few pairs" in experiment.tables(table)[-1].note


def test_sources_without_a_standing_object():
    rows = [row | {"anchors": [""] * 4} for row in rows_of()]
    experiment = RelationVectors()
    assert not any("even where A stands" in f.statement for f in experiment.summarize(pa.Table.from_pylist(rows)))
    assert not experiment.tables(pa.Table.from_pylist(rows))[-1].rows


def test_noise_has_the_spread_of_the_tokens_and_no_relation():
    rng = np.random.default_rng(0)
    groups = [[rng.normal(size=(30, WIDTH)) + 3 for _ in range(4)] for _ in range(2)]
    found = [noise_measures(groups, rng, clusters=False) for _ in range(60)]
    assert abs(np.mean([each["noise_separation"] for each in found])) < 0.1
    assert np.mean([each["noise_score"] for each in found]) == pytest.approx(1, abs=0.05)
    assert found[0]["agreement"] is None
