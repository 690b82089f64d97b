"""Paired tests, Holm's correction and power against brute force, simulation and published examples."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from dualstream.eval.significance import (
    holm,
    images_for_half_width,
    images_needed,
    mcnemar_exact,
    mcnemar_power,
    sign_flip_test,
    smallest_loss_found,
)
from dualstream.eval.statistics import proportion

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(pairs)
def test_mcnemar_is_the_sum_over_all_ways_the_disagreements_could_have_gone(rows):
    treatment, control = (np.array(column) for column in zip(*rows, strict=True))
    found = mcnemar_exact(treatment, control)
    gained, lost = sum(a and not b for a, b in rows), sum(b and not a for a, b in rows)
    assert (found.gained, found.lost, found.n) == (gained, lost, len(rows))
    chances = [0.5 ** (gained + lost)]
    for k in range(gained + lost):
        chances.append(chances[-1] * (gained + lost - k) / (k + 1))
    tail = sum(chances[: min(gained, lost) + 1])
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_exact(control, treatment).p_value == pytest.approx(found.p_value)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_sign_flips_are_all_taken_where_they_are_few(values):
    values = np.array(values) / 8  # exact in binary: ties are ties
    observed = abs(values.sum())
    flipped = [abs(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=len(values))]
    assert sign_flip_test(values) == pytest.approx(np.mean(np.array(flipped) >= observed - 1e-12))


def test_random_sign_flips_reproduce_agree_with_the_normal_test_and_are_never_zero():
    rng = np.random.default_rng(0)
    values = rng.normal(0.2, 1.0, size=100)
    first = sign_flip_test(values, seed=1)
    assert first == sign_flip_test(values, seed=1) != sign_flip_test(values, seed=2)
    from scipy.stats import ttest_1samp

    assert first == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.015)
    assert sign_flip_test(np.ones(100), resamples=999) == pytest.approx(2 / 1000)
    assert sign_flip_test(np.zeros(5)) == 1


def test_sign_flips_of_clusters_keep_their_size_where_single_ones_do_not():
    """Ten alike cells per image: flipping cells finds differences that are not there."""
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(15), 10)
    naive = clustered = 0
    for trial in range(150):
        values = rng.normal(size=15)[images] + 0.1 * rng.normal(size=150)
        naive += sign_flip_test(values, seed=trial, resamples=299) <= 0.05
        clustered += sign_flip_test(values, images, seed=trial, resamples=299) <= 0.05
    assert clustered / 150 < 0.11 < 0.3 < naive / 150


def test_holm_of_a_worked_example():
    adjusted = holm([[0.01, 0.04], [0.03, 0.005]])
    np.testing.assert_allclose(adjusted, [[0.03, 0.06], [0.06, 0.02]])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[index] * (len(p_values) - rank) > level:
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(adjusted <= level)) == rejected
    assert (adjusted >= np.array(p_values)).all() and (adjusted <= 1).all()


def test_holm_keeps_the_chance_of_any_false_finding_and_separate_tests_do_not():
    rng = np.random.default_rng(1)
    tables = rng.random((500, 36))
    assert np.mean([(holm(table) <= 0.05).any() for table in tables]) < 0.08
    assert np.mean([(table <= 0.05).any() for table in tables]) > 0.7


@pytest.mark.parametrize(("n", "lost", "gained"), [(8, 0.4, 0.1), (15, 0.5, 0.0), (12, 0.2, 0.2), (6, 0.9, 0.1)])
def test_power_is_the_sum_over_all_outcomes(n, lost, gained):
    from scipy.stats import multinomial

    total = 0.0
    for down in range(n + 1):
        for up in range(n + 1 - down):
            if down + up and binomtest(up, down + up).pvalue <= 0.05:
                total += multinomial.pmf([down, up, n - down - up], n, [lost, gained, max(1 - lost - gained, 0)])
    assert mcnemar_power(n, lost, gained) == pytest.approx(total)


def test_power_at_no_difference_is_at_most_the_level():
    assert mcnemar_power(500, 0.1, 0.1) <= 0.05
    assert mcnemar_power(10, 0.0, 0.0) == 0


def test_number_of_images_has_the_power_and_fewer_do_not():
    needed = images_needed(0.10, 0.02)
    assert all(mcnemar_power(n, 0.10, 0.02) >= 0.8 for n in range(needed, needed + 20))
    assert mcnemar_power(needed - 1, 0.10, 0.02) < 0.8
    assert images_needed(0.10, 0.02, level=0.05 / 36) > 1.5 * needed  # the whole table of windows and routes
    assert images_needed(1.0) == 6  # five losses of five have p = 0.0625
    loss = smallest_loss_found(needed, 0.02)
    assert loss == pytest.approx(0.10, abs=0.005)
    assert np.isnan(smallest_loss_found(5))


def test_images_for_an_interval_as_narrow_as_asked():
    needed = images_for_half_width(0.05)
    half = lambda n: np.ptp([getattr(proportion(np.arange(n) < n // 2), end) for end in ("low", "high")]) / 2
    assert half(needed + needed % 2) <= 0.05 < half(needed - 4 - needed % 2)
    assert images_for_half_width(0.05, share=0.05) < needed


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"paired: shapes \(2,\) and \(3,\)"):
        mcnemar_exact(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="only 0/1"):
        mcnemar_exact(np.array([0, 2]), np.array([0, 1]))
    with pytest.raises(ValueError, match="finite"):
        sign_flip_test(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="clusters must hold 3"):
        sign_flip_test(np.ones(3), ["a", "b"])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        holm([0.5, np.nan])
    with pytest.raises(ValueError, match="no difference to find"):
        images_needed(0.1, 0.1)
    with pytest.raises(ValueError, match="sum of at most 1"):
        mcnemar_power(10, 0.8, 0.3)
    with pytest.raises(ValueError, match="half_width"):
        images_for_half_width(0.6)
