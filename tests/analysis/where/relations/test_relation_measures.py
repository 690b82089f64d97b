"""New measures tell true, wrongly paired and random relation vectors apart; the published ones do not."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.where.relations.relation_measures import (
    axis_differences,
    centred,
    cosines,
    crossing,
    mean_separation,
    noise_tokens,
    opposition,
    published_cluster_agreement,
    published_geometry_score,
    separation,
    shared_direction,
)
from dualstream.analysis.where.relations.relation_probes import (
    correct_of_four,
    object_disjoint_folds,
    paired_sides,
    permuted_labels,
    probe_scores,
    without_place,
)

WIDTH = 300


def true_geometry(pairs=20, looks=5.0, seed=0):
    """left = -right, high = -low, orthogonal, plus what the two objects look like, the same in all four."""
    rng = np.random.default_rng(seed)
    h, v = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T
    common = looks * rng.normal(size=(pairs, 1, WIDTH)) / np.sqrt(WIDTH)
    return np.stack([h, -h, v, -v]) + common


def equal_norm_noise(pairs=200, seed=0):
    """Vectors whose centred versions have one length: corners of a regular simplex, freely rotated."""
    rng = np.random.default_rng(seed)
    simplex = np.eye(4) - 0.25
    return np.stack([simplex @ np.linalg.qr(rng.normal(size=(WIDTH, 4)))[0].T for _ in range(pairs)])


def test_true_wrong_and_random_are_separated():
    true = true_geometry()
    np.testing.assert_allclose(separation(true), 1, atol=1e-9)
    np.testing.assert_allclose(crossing(true), 0, atol=1e-9)
    np.testing.assert_allclose(opposition(centred(true)), 1, atol=1e-9)
    wrong = true[:, [0, 2, 1, 3]]  # left stands opposite "high"
    np.testing.assert_allclose(separation(wrong), -0.5, atol=1e-9)
    random = separation(equal_norm_noise())
    assert abs(random.mean()) < 0.05 and np.abs(random).max() < 0.5


def test_means_over_pairs_are_not_fooled_by_what_the_pictures_of_an_axis_share():
    """A layout of its own for every pair and axis: single pairs look wrongly paired, the mean vectors do not."""
    rng = np.random.default_rng(0)
    vectors = true_geometry(60)
    layout = 3 * rng.normal(size=(60, 2, WIDTH)) / np.sqrt(WIDTH)
    vectors = vectors + layout.repeat(2, axis=1)
    assert separation(vectors).mean() < 0
    value, low, high = mean_separation(vectors)
    assert 0.8 < low <= value <= high and value == pytest.approx(1, abs=0.2)
    wrong, _, high = mean_separation(vectors[:, [0, 2, 1, 3]])
    assert wrong == pytest.approx(-0.5, abs=0.2) and high < 0
    _, low, high = mean_separation(rng.normal(size=(60, 4, WIDTH)))
    assert low < 0 < high


def test_the_published_score_is_one_for_anything_of_one_length():
    """Right pairing, wrong pairing and random vectors: 1 each time (spec 3.1)."""
    true, random = true_geometry(5), equal_norm_noise(50)
    for vectors in (*true, *true[:, [0, 2, 1, 3]], *random):
        assert published_geometry_score(vectors) == pytest.approx(1, abs=1e-6)
    gaussian = np.random.default_rng(1).normal(size=(100, 4, 3584))
    scores = [published_geometry_score(vectors) for vectors in gaussian]
    assert abs(np.mean(scores) - 1) < 1e-3
    uneven = gaussian * np.sqrt([1, 1, 2, 2])[:, None]  # all that it reflects: vectors of different length
    assert np.mean([published_geometry_score(vectors) for vectors in uneven]) < 0.99


def test_the_published_clusters_are_perfect_on_pure_noise():
    rng = np.random.default_rng(0)
    mean, spread = np.zeros(256), np.ones(256)
    scores = []
    for seed in range(3):
        subjects = noise_tokens([80] * 4, mean, spread, rng)
        references = noise_tokens([45] * 4, mean, spread, rng)
        scores.append(published_cluster_agreement(subjects, references, seed))
    assert min(scores) > 0.99


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_renaming_the_relations_at_random_separates_nothing(seed):
    """Averaged over all 24 ways to name the four vectors the separation is 0, whatever they are."""
    vectors = np.random.default_rng(seed).normal(size=(4, 7)) * np.arange(1, 5)[:, None]
    values = [separation(vectors[list(order)]) for order in itertools.permutations(range(4))]
    assert np.mean(values) == pytest.approx(0, abs=1e-9)
    assert np.all(np.abs(values) <= 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 50))
def test_looks_and_scale_do_not_count(seed, scale):
    rng = np.random.default_rng(seed)
    vectors, looks = rng.normal(size=(4, 9)), rng.normal(size=9) * 20
    assert separation(scale * vectors + looks) == pytest.approx(separation(vectors), abs=1e-6)
    assert crossing(scale * vectors + looks) == pytest.approx(crossing(vectors), abs=1e-6)


def test_shared_direction_against_a_loop():
    rng = np.random.default_rng(0)
    differences = axis_differences(rng.normal(size=(6, 4, 11)) + 0.3)
    loop = np.mean(
        [cosines(differences[[i, j], axis])[0, 1] for axis in (0, 1) for i in range(6) for j in range(6) if i != j]
    )
    value, low, high = shared_direction(differences)
    assert value == pytest.approx(loop) and low <= value <= high
    same = np.tile(differences[:1], (4, 1, 1)) * np.arange(1, 5)[:, None, None]
    np.testing.assert_allclose(shared_direction(same), 1)


def test_the_interval_of_a_shared_direction_covers():
    """Cosines of different pairs share pairs; an interval over cosines, or over means of pairs, is too narrow."""
    rng, truth, hits = np.random.default_rng(0), [], 0
    draws = [rng.normal(size=(30, 1, 3)) + 0.4 for _ in range(120)]
    truth = np.mean([shared_direction(each, resamples=1)[0] for each in draws])
    for each in draws:
        _, low, high = shared_direction(each, resamples=300)
        hits += low <= truth <= high
    assert hits >= 0.85 * len(draws)


def kinds_of(pairs, names=12, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(f"thing {n}" for n in rng.choice(names, 2, replace=False)) for _ in range(pairs)]


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 80), st.integers(3, 30), st.integers(0, 99))
def test_no_object_is_in_training_and_test(pairs, names, seed):
    kinds, tested = kinds_of(pairs, names, seed), []
    for train, test in object_disjoint_folds(kinds, seed=seed):
        seen = {name for index in train for name in kinds[index]}
        assert not seen & {name for index in test for name in kinds[index]}
        tested += test.tolist()
    assert len(tested) == len(set(tested))
    if names >= 12 and pairs >= 60:
        assert len(tested) == pairs


def test_probes_find_a_relation_and_nothing_else():
    kinds, labels = kinds_of(60), np.tile(np.arange(4), (60, 1))
    vectors = true_geometry(60, looks=2.0)
    scores = probe_scores(vectors, labels[None], kinds)[0]
    assert correct_of_four(scores, labels).mean() > 0.95
    wrong = permuted_labels(60, 1)
    both = probe_scores(vectors, np.stack([wrong, labels]), kinds)
    assert correct_of_four(both[0], wrong).mean() < 0.4
    np.testing.assert_allclose(both[1], scores)  # namings do not touch each other
    assert sorted(wrong[3]) == [0, 1, 2, 3]


def test_a_place_can_be_taken_out():
    """Features that are nothing but the object's place tell the relation, and no longer do without the place."""
    rng = np.random.default_rng(0)
    kinds, labels = kinds_of(60), np.tile(np.arange(4), (60, 1))
    steps = np.array([[-0.3, 0], [0.3, 0], [0, -0.3], [0, 0.3]])
    places = 0.5 + steps + 0.05 * rng.normal(size=(60, 4, 2))
    features = places @ rng.normal(size=(2, 50)) + 1e-3 * rng.normal(size=(60, 4, 50))
    assert correct_of_four(probe_scores(features, labels[None], kinds)[0], labels).mean() > 0.95
    left = without_place(features, places, kinds)
    assert correct_of_four(probe_scores(left, labels[None], kinds)[0], labels).mean() < 0.4


def test_paired_sides_against_a_loop():
    rng = np.random.default_rng(0)
    kinds, differences = kinds_of(12, names=8), rng.normal(size=(12, 5)) + 0.4
    unit = differences / np.linalg.norm(differences, axis=1, keepdims=True)
    signs = rng.choice([-1.0, 1.0], (3, 12))
    for own, answers in zip(signs, paired_sides(differences, kinds, signs), strict=True):
        turned = own[:, None] * unit
        for pair, found in enumerate(answers):
            others = [other for other in range(12) if not set(kinds[pair]) & set(kinds[other])]
            assert found == (turned[pair] @ turned[others].sum(0) > 0)
    assert np.isnan(paired_sides(differences[:2], [("a", "b"), ("b", "c")])).all()
    assert paired_sides(np.ones((4, 3)), [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]).tolist() == [[1.0] * 4]
