"""Figures of the study against brute force, the coverage of its intervals, and the sentence for every outcome."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.rope_scaling_study.scoring import (
    METRICS,
    cell_figures,
    correctness,
    difference,
    flip_consistent,
    per_set,
)
from dualstream.analysis.rope_scaling_study.selection import choose, score
from dualstream.analysis.rope_scaling_study.verdict import (
    INCONCLUSIVE,
    NEGATIVE,
    POSITIVE,
    conclusion,
    find,
    finding_text,
    judge,
)
from dualstream.data_builders.spatial_sft import RELATIONS
from dualstream.eval.statistics import clustered_mean, clustered_share

TABLES = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12)


def answer_rows(table, condition="c", form="f", mirrored=False):
    return [
        {
            "condition": condition,
            "form": form,
            "mirrored": mirrored,
            "set_id": number,
            "kind": relation,
            "correct": right,
            "valid": right,
            "choice": relation if right else "left",
            "nll": float(number),
        }
        for number, row in enumerate(table)
        for relation, right in zip(RELATIONS, row, strict=True)
    ]


def brute_force(table, metric):
    """Counted the way the benchmark is defined: left and right are a pair, above and below are a pair."""
    hits = total = 0
    for row in table:
        by_name = dict(zip(RELATIONS, row, strict=True))
        groups = {
            "individual": [[name] for name in RELATIONS],
            "pair": [["left", "right"], ["above", "below"]],
            "set": [list(RELATIONS)],
        }[metric]
        for group in groups:
            total += 1
            hits += all(by_name[name] for name in group)
    return hits / total


@given(TABLES)
@settings(max_examples=80, deadline=None)
def test_metrics_equal_brute_force_whatever_the_order_of_rows(table):
    rows = answer_rows(table)
    np.random.default_rng(0).shuffle(rows)
    correct = correctness(rows)
    assert np.array_equal(correct, np.array(table))
    for metric in METRICS:
        assert per_set(correct, metric).mean() == pytest.approx(brute_force(table, metric))


def test_incomplete_sets_and_unknown_metrics_are_refused():
    rows = answer_rows([[True] * 4, [False] * 4])
    with pytest.raises(ValueError, match="1 of 8"):
        correctness(rows[:-1])
    with pytest.raises(ValueError, match="incomplete"):
        correctness([])
    with pytest.raises(ValueError, match="individual, pair, set"):
        per_set(np.ones((1, 4), bool), "group")


def test_cells_count_every_condition_and_form_apart():
    rows = answer_rows([[True] * 4], "a", "x") + answer_rows([[True, False, True, True]], "a", "y")
    rows += answer_rows([[False] * 4], "a", "x", mirrored=True)
    cells = {(cell["condition"], cell["form"]): cell for cell in cell_figures(rows)}
    assert set(cells) == {("a", "x"), ("a", "y")}
    assert cells["a", "x"]["individual"] == 1 and cells["a", "x"]["n"] == 4
    assert (cells["a", "y"]["individual"], cells["a", "y"]["pair"], cells["a", "y"]["set"]) == (0.75, 0.5, 0)
    assert cells["a", "y"]["invalid"] == 0.25


def test_mean_and_bounds_are_those_of_all_resamples():
    """Two runs and two pairs have 4 x 4 equally likely resamples: the interval's ends must be among their means."""
    values = np.array([[0.0, 1.0], [0.5, 0.25]])
    found = clustered_mean(values, resamples=20_000)
    means = sorted(
        np.mean([[values[r, p] for p in pairs] for r in runs])
        for runs in itertools.product(range(2), repeat=2)
        for pairs in itertools.product(range(2), repeat=2)
    )
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(means[0]), pytest.approx(means[-1]))
    assert found.n == 2


def test_intervals_cover_where_pictures_of_a_pair_agree():
    """Answers inside a set are alike: an interval over sets covers, one over single pictures would not."""
    rng = np.random.default_rng(1)
    sets, trials, inside, naive = 60, 300, 0, 0
    for trial in range(trials):
        easy = rng.random(sets) < 0.6
        correct = rng.random((sets, 4)) < np.where(easy, 0.97, 0.05)[:, None]
        truth = 0.6 * 0.97 + 0.4 * 0.05
        found = clustered_share(per_set(correct, "individual")[None], resamples=400, seed=trial, step=0.25)
        inside += found.low <= truth <= found.high
        half = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / correct.size)
        naive += abs(correct.mean() - truth) <= half
    assert inside / trials > 0.91
    assert naive / trials < 0.8


@pytest.mark.parametrize("pairs", [20, 60, 200])
def test_pairs_that_agree_leave_room_for_what_they_would_miss(pairs):
    """The interval of no change at all against the exact one: rates that give no change with a chance of 5 %."""
    same = np.full((3, pairs), 0.5)
    found = difference(same, same, step=0.25)
    exact = 0.25 * (1 - 0.05 ** (1 / pairs))
    assert found["value"] == 0 and found["n"] == pairs
    assert found["high"] == pytest.approx(exact, rel=0.35) and found["low"] == pytest.approx(-found["high"], rel=0.35)
    certain = clustered_share(np.ones((1, pairs)), step=0.25)
    assert certain.high == 1 and 1 - certain.low == pytest.approx(exact, rel=0.35)


def test_made_up_pairs_hardly_matter_where_pairs_differ():
    values = np.random.default_rng(0).random((1, 300))
    with_step, without = clustered_mean(values, step=0.25), clustered_mean(values)
    assert with_step.value == without.value
    assert with_step.low == pytest.approx(without.low, abs=0.005)


def test_intervals_widen_with_the_spread_of_runs():
    pairs = np.random.default_rng(0).random(200)
    alike = clustered_mean(np.stack([pairs, pairs, pairs]))
    apart = clustered_mean(np.stack([pairs - 0.2, pairs, pairs + 0.2]))
    assert apart.high - apart.low > 2 * (alike.high - alike.low)
    one = clustered_mean(pairs[None])
    assert (alike.low, alike.high) == (pytest.approx(one.low, abs=0.01), pytest.approx(one.high, abs=0.01))


def test_paired_difference_is_tighter_than_two_intervals_and_names_every_run():
    rng = np.random.default_rng(2)
    hard = rng.random(100)
    control, treatment = hard[None], np.stack([hard + 0.05, hard + 0.07])
    found = difference(treatment, control)
    assert found["value"] == pytest.approx(0.06)
    assert found["runs"] == [pytest.approx(0.05), pytest.approx(0.07)]
    assert found["low"] >= 0.05 - 1e-9 and found["high"] <= 0.07 + 1e-9
    assert difference(control, control)["high"] == 0
    with pytest.raises(ValueError, match="paired"):
        difference(treatment, np.stack([hard] * 3))
    with pytest.raises(ValueError, match="2-D"):
        clustered_mean(hard)


def test_mirror_images_swap_left_and_right_and_nothing_else():
    def rows(mirrored, choices):
        return [
            {"set_id": 0, "kind": kind, "choice": choice, "mirrored": mirrored, "correct": False}
            for kind, choice in zip(RELATIONS, choices, strict=True)
        ]

    plain = rows(False, ["left", "right", "above", "left"])
    fitting = rows(True, ["right", "left", "above", "right"])
    assert flip_consistent(plain + fitting).all()
    stuck = rows(True, ["left", "right", "above", "left"])
    assert flip_consistent(plain + stuck).tolist() == [[False, False, True, False]]
    with pytest.raises(ValueError, match="belong together"):
        flip_consistent(plain + fitting[:2])


# --- choice


def record(arm, accuracy, nll=1.0, split="validation"):
    return {"arm": arm, "split": split, "cells": [{"individual": accuracy, "nll": nll}]}


def test_choice_takes_the_best_of_equals_the_strongest_and_leaves_stock_out():
    records = [
        record("stock", 0.9),
        record("poly:1:1", 0.7),
        record("poly:9:1", 0.7),
        record("poly:9:8", 0.7),
        record("exp:2", 0.6),
    ]
    records += [record("exp:0.5", 0.8), record("poly:-0.5:2", 0.75)]
    assert choose(records) == "poly:9:1"
    assert choose(records, "exp") == "exp:2"
    assert choose(records, raising=False) == "exp:0.5"
    with pytest.raises(ValueError, match="sigmoid"):
        choose(records, "sigmoid")
    with pytest.raises(ValueError, match="any"):
        choose([record("stock", 1.0)])


def test_choice_refuses_what_was_not_measured_on_validation_pictures():
    with pytest.raises(ValueError, match="'test'"):
        choose([record("poly:1:1", 0.7), record("exp:2", 0.9, split="test")])
    with pytest.raises(ValueError, match="validation"):
        score(record("poly:1:1", 0.7, split="train"))


# --- the sentence


def estimate(value, low, high, runs=None):
    return {"value": value, "low": low, "high": high, "n": 60, "runs": runs or [value]}


BETTER, WORSE, NOTHING = estimate(0.05, 0.02, 0.08), estimate(-0.05, -0.08, -0.02), estimate(0.01, -0.02, 0.04)


@pytest.mark.parametrize(
    ("given_estimate", "verdict"),
    [
        (BETTER, POSITIVE),
        (WORSE, NEGATIVE),
        (NOTHING, INCONCLUSIVE),
        (estimate(0.05, 0.0, 0.08), INCONCLUSIVE),
        (estimate(0.05, 0.02, 0.08, [0.1, 0.06, -0.01]), INCONCLUSIVE),
        (estimate(-0.05, -0.08, -0.02, [-0.1, 0.01]), INCONCLUSIVE),
    ],
)
def test_verdict_needs_the_interval_and_every_run(given_estimate, verdict):
    assert judge(given_estimate) == verdict


def test_sentence_where_scaling_helps_more_than_controls():
    finding = find("on old pictures", BETTER, {"permuted": WORSE, "random": WORSE})
    text = conclusion([finding])
    assert text.startswith("RoPE scaling helps on old pictures. In detail:")
    assert "+5.0 points [+2.0, +8.0], 60 object pairs" in text
    assert "more than every control (permuted and random)" in text


@pytest.mark.parametrize("rival", [NOTHING, BETTER])
def test_sentence_where_a_control_does_as_well(rival):
    text = conclusion([find("on old pictures", BETTER, {"permuted": WORSE, "random": rival})])
    assert "helps" not in text.split(". In detail")[0]
    assert "no better than that of a control" in text and "the control random" in text


def test_sentence_where_scaling_harms_or_nothing_is_shown():
    assert conclusion([find("on old pictures", WORSE, {})]).startswith("RoPE scaling harms on old pictures.")
    text = conclusion([find("on old pictures", NOTHING, {}), find("on new pictures", NOTHING, {})])
    assert text.startswith("These data show no effect of RoPE scaling")
    assert "a change of more than 4.0 points is excluded" in text


def test_sentence_of_mixed_findings_names_each_place_once_in_its_part():
    findings = [find("here", BETTER, {"random": WORSE}), find("there", WORSE, {}), find("beyond", NOTHING, {})]
    head = conclusion(findings).split(". In detail")[0]
    assert head == "RoPE scaling helps here; it harms there; nothing is shown beyond"


def test_detail_of_a_positive_finding_without_controls_claims_none():
    assert "control" not in finding_text(find("here", BETTER, {}))


def test_findings_are_json():
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(find("here", BETTER, {"random": WORSE}))))["rivals"] == []
