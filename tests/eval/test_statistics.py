"""Intervals against closed forms and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.eval.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    cluster_bootstrap_mean,
    cluster_proportion,
    paired_difference,
    proportion,
)

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def test_wilson_interval_equals_the_closed_form():
    n, k, z = 50, 47, 1.959963984540054
    estimate = proportion(np.arange(n) < k)
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert estimate.value == p
    assert (estimate.low, estimate.high) == pytest.approx((centre - half, centre + half))


@given(pairs)
def test_paired_difference_contains_its_estimate_and_is_antisymmetric(rows):
    a, b = (np.array(column) for column in zip(*rows, strict=True))
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert forward.low <= forward.value <= forward.high
    assert forward.value == pytest.approx(a.mean() - b.mean())
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))


def test_identical_arms_still_have_an_interval():
    same = np.ones(1000, dtype=bool)
    estimate = paired_difference(same, same)
    assert estimate.value == 0
    assert -0.01 < estimate.low < 0 < estimate.high < 0.01


def test_paired_interval_covers_the_truth_in_simulation():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        control = rng.random(300) < 0.95
        flips = rng.random(300)
        treatment = np.where(flips < 0.02, ~control, control)
        truth = 0.02 * (0.05 - 0.95)
        estimate = paired_difference(treatment, control)
        covered += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered / 400 <= 1.0


def test_bootstrap_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 1.0, size=400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


@pytest.mark.parametrize("bad", [np.array([]), np.array([[1, 0]]), np.array([0, 2])])
def test_bad_input_is_refused(bad):
    with pytest.raises(ValueError, match="correct must"):
        proportion(bad)


def test_unpaired_arms_are_refused():
    with pytest.raises(ValueError, match="paired: 2 and 3"):
        paired_difference(np.array([1, 0]), np.array([1, 0, 1]))


def test_a_ratio_of_means_agrees_with_the_delta_method():
    rng = np.random.default_rng(2)
    below = rng.normal(0.8, 0.1, size=400)
    above = 0.9 * below + rng.normal(0, 0.02, size=400)
    estimate = bootstrap_ratio(above, below)
    ratio = above.mean() / below.mean()
    half = 1.96 * (above - ratio * below).std(ddof=1) / (below.mean() * 20)
    assert estimate.value == pytest.approx(ratio)
    assert (estimate.low, estimate.high) == pytest.approx((ratio - half, ratio + half), abs=0.2 * half)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=30), st.floats(0.1, 10))
def test_a_constant_ratio_has_no_uncertainty(values, factor):
    values = np.array(values)
    estimate = bootstrap_ratio(factor * values, values, resamples=50)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((factor,) * 3)


def test_ratios_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"paired: \(2,\) and \(3,\)"):
        bootstrap_ratio(np.ones(2), np.ones(3))
    for bad in (np.zeros(2), np.array([1.0, -1.0])):
        with pytest.raises(ValueError, match="denominator must hold no negative figure"):
            bootstrap_ratio(np.ones(2), bad)
    assert (
        bootstrap_ratio(np.array([0.0, 1.0]), np.array([0.0, 1.0])).high == 1
    )  # resamples of zeros only are left out


def image_cells(rng, images=80, cells=12):
    """Cells of images that are mostly all right or mostly all wrong; the true share is 0.5."""
    labels = np.repeat(np.arange(images), cells)
    level = np.where(rng.random(images) < 0.5, 0.95, 0.05)
    return labels, rng.random(labels.size) < level[labels]


def test_cluster_intervals_cover_where_the_plain_one_does_not():
    rng = np.random.default_rng(4)
    bootstrap = wilson = naive = 0
    for trial in range(200):
        labels, correct = image_cells(rng)
        found = cluster_bootstrap_mean(correct, labels, seed=trial, resamples=300)
        bootstrap += found.low <= 0.5 <= found.high
        found = cluster_proportion(correct, labels)
        wilson += found.low <= 0.5 <= found.high
        found = proportion(correct)
        naive += found.low <= 0.5 <= found.high
    assert bootstrap / 200 > 0.9 and wilson / 200 > 0.9
    assert naive / 200 < 0.7


def test_single_observations_as_clusters_give_the_plain_intervals():
    correct = np.random.default_rng(5).random(300) < 0.3
    each = np.arange(300)
    assert cluster_proportion(correct, each).to_dict() == pytest.approx(proportion(correct).to_dict(), abs=2e-3)
    found, plain = cluster_bootstrap_mean(correct, each), bootstrap_mean(correct)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.01)


def test_cluster_means_are_among_those_of_all_resamples():
    values, labels = np.array([1.0, 2.0, 6.0]), ["a", "a", "b"]
    found = cluster_bootstrap_mean(values, labels)
    assert (found.value, found.low, found.high, found.n) == (3.0, 1.5, 6.0, 2)


def test_crossed_clusters_widen_the_interval():
    """Images differ little and classes a lot: resampling images alone hides it."""
    rng = np.random.default_rng(6)
    images, classes = np.arange(400), rng.integers(0, 6, 400)
    values = rng.normal(size=6)[classes] + 0.1 * rng.normal(size=400)
    alone, crossed = cluster_bootstrap_mean(values, images), cluster_bootstrap_mean(values, images, classes)
    assert crossed.high - crossed.low > 3 * (alone.high - alone.low)
    assert crossed.n == 6 and alone.n == 400


def test_clusters_that_all_agree_still_have_an_interval():
    found = cluster_proportion(np.zeros(1000, dtype=bool), np.repeat(np.arange(20), 50))
    assert found.to_dict() == pytest.approx(proportion(np.zeros(20, dtype=bool)).to_dict())


def test_clusters_without_labels_are_refused():
    with pytest.raises(ValueError, match="one label per value: 3 values"):
        cluster_bootstrap_mean(np.ones(3), ["a", "b"])
    with pytest.raises(ValueError, match="at least one label array"):
        cluster_bootstrap_mean(np.ones(3))
    with pytest.raises(ValueError, match="one label per value: 2 values"):
        cluster_proportion(np.ones(2), ["a"])
