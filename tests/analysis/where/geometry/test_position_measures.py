"""Measures of a field of vectors against fields whose geometry is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.where.geometry.position_measures import (
    consistency,
    crossing_cosines,
    decoded_lines,
    null_range,
    opposite_cosines,
    shuffled,
    steps_of,
)


def plane(rows=9, cols=7, width=40, seed=0):
    """An exact plane in `width` dimensions with orthogonal axes and a large common offset."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(width, 3)))[0].T
    row, col = np.mgrid[:rows, :cols]
    return row[..., None] * basis[0] + 2 * col[..., None] * basis[1] + 50 * basis[2]


def noise(rows=12, cols=12, width=400, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, cols, width))


@pytest.mark.parametrize("step", [1, 2])
def test_a_plane_is_straight_orthogonal_and_consistent(step):
    field = plane()
    for axis, shape in (("row", (9 - 2 * step, 7)), ("col", (9, 7 - 2 * step))):
        opposite = opposite_cosines(field, axis, step)
        assert opposite.shape == shape
        np.testing.assert_allclose(opposite, -1, atol=1e-9)
        np.testing.assert_allclose(consistency(field, axis, step), 1, atol=1e-9)
        assert decoded_lines(field, axis).min() > 0.999
    np.testing.assert_allclose(crossing_cosines(field, step), 0, atol=1e-9)


def test_noise_gives_the_values_that_algebra_says():
    field = noise()
    for axis in ("row", "col"):
        assert opposite_cosines(field, axis, 2).mean() == pytest.approx(0.5, abs=0.02)
        assert consistency(field, axis, 2).mean() == pytest.approx(0.0, abs=0.02)
        assert decoded_lines(field, axis).mean() < 0.05
    assert crossing_cosines(field, 2).mean() == pytest.approx(0.0, abs=0.02)


def test_axes_are_told_apart():
    """Only the columns of this field are ordered."""
    field = noise(seed=1) * 0.01
    field = field + np.arange(12)[None, :, None] * np.random.default_rng(2).normal(size=400)
    assert opposite_cosines(field, "col", 1).mean() < -0.9
    assert opposite_cosines(field, "row", 1).mean() > 0.3
    assert decoded_lines(field, "col").mean() > 0.99
    assert decoded_lines(field, "row").mean() < 0.2


def test_shuffling_a_plane_leaves_no_order():
    mean, low, high = null_range(lambda field: float(opposite_cosines(field, "row", 1).mean()), plane(), 50, 0)
    assert low < mean < high
    assert low > -0.3 and 0.1 < mean < 0.6
    assert np.allclose(np.sort(shuffled(plane(), np.random.default_rng(0)).ravel()), np.sort(plane().ravel()))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(3, 40))
def test_steps_fit_on_both_sides(rows, cols):
    steps = steps_of(rows, cols)
    assert steps and all(2 * step < min(rows, cols) for step in steps)
    field = np.random.default_rng(0).normal(size=(rows, cols, 3))
    for step in steps:
        assert crossing_cosines(field, step).size and np.abs(opposite_cosines(field, "col", step)).max() <= 1 + 1e-9


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="row, col"):
        opposite_cosines(plane(), "depth", 1)
