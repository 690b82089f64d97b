"""Fits recover known coefficients; curves are measured on the product path, and the model is left as it was."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.benchmarks.growth import fits, suite
from dualstream.benchmarks.growth.points import POINTS, Growth, cut
from dualstream.benchmarks.prefill import FULL, OURS, uncompressed
from dualstream.benchmarks.shapes import SHAPES, build_config, build_model
from dualstream.benchmarks.workload import make_inputs
from dualstream.measuring import count_work
from dualstream.modeling.families import family_of

LARGE, SMALL = (448, 672), (224, 224)
coefficient = st.one_of(st.just(0.0), st.floats(0.01, 50))


@functools.cache
def toy(name="tiny-qwen2.5-vl"):
    return build_model(name)


@settings(max_examples=40, deadline=None)
@given(st.lists(coefficient, min_size=2, max_size=3).filter(any), st.integers(1, 2000))
def test_a_fit_recovers_what_made_the_costs(parts, scale):
    x = np.arange(1, 7) * scale
    made = np.array(parts) / float(scale) ** np.arange(len(parts))
    costs = fits.polynomial(made, x)
    found = fits.fit(list(x), np.stack([costs] * 3), len(parts) - 1)
    assert found.at(x) == pytest.approx(costs, rel=1e-6)
    np.testing.assert_allclose(found.parts, made, atol=1e-6 * max(made[0], costs.max() / x.max() ** 2, 1e-9))
    assert found.worst_residual < 1e-6
    assert np.all(found.low <= found.parts + 1e-12) and np.all(found.parts <= found.high + 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_intervals_hold_the_truth_under_noise(seed):
    """A slope far above the noise: its interval is narrow and near it, also far beyond the points."""
    rng, x = np.random.default_rng(seed), np.array([1.0, 2.0, 4.0, 8.0])
    rounds = (5 + 2 * x) * rng.lognormal(0, 0.02, (15, 4))
    found = fits.fit(list(x), rounds, 1)
    assert found.parts == pytest.approx([5, 2], rel=0.2)
    low, high = found.interval(32)
    assert 0.85 * 69 < low <= found.at(32) <= high < 1.15 * 69


def test_a_fit_has_no_negative_part():
    parts = fits.least_squares(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 4.9]), 2)
    assert (parts >= 0).all()


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="too few"):
        fits.fit([1, 2], np.ones((3, 2)), 2)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("tiny")])
def test_a_cut_model_is_the_shallow_model_and_is_whole_again(name):
    model = toy(name)
    inputs = make_inputs(model, SHAPES[name].image_size)
    whole = count_work(uncompressed(model, inputs)).flops
    config, blocks = model.config.get_text_config().to_dict(), list(family_of(model).llm_blocks(model))
    with pytest.raises(RuntimeError, match="inside"), cut(model, 2):
        shallow = count_work(uncompressed(model, inputs)).flops
        assert shallow == count_work(uncompressed(build_model(name, layers=2), inputs)).flops < whole
        raise RuntimeError("inside")
    assert list(family_of(model).llm_blocks(model)) == blocks
    assert model.config.get_text_config().to_dict() == config
    assert count_work(uncompressed(model, inputs)).flops == whole


@pytest.mark.parametrize("curve", POINTS)
def test_points_do_the_work_that_their_rows_say(curve):
    """Every way of every curve is counted: what the closed form says of a point is what running it does."""
    points = POINTS[curve](Growth(toy(), "tiny-qwen2.5-vl", SMALL, 20, 0.5, "pruned", quick=True))
    assert len({point.x for point in points}) == len(points) > suite.DEGREES[curve]
    for point in points:
        for name, way in point.ways.items():
            assert point.flops[name] == pytest.approx(count_work(way).flops, rel=0.01), (curve, point.x, name)


def test_rows_are_plain_and_complete(tmp_path):
    rows = suite.run(toy(), "tiny-qwen2.5-vl", SMALL, 0.5, rounds=2, text_tokens=20, quick=True)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert {row["suite"] for row in rows} == {"growth"}
    for curve in suite.CURVES:
        mine = [row for row in rows if row["curve"] == curve]
        fits = [row for row in mine if row["kind"] == "fit"]
        assert fits and all(row["constant_ms_low"] <= row["constant_ms_high"] for row in fits)
        assert all(row["explanation"].startswith("From") for row in fits)
        assert all(row["rounds"] == 2 for row in mine if row["kind"] == "point")
    answers = [row for row in rows if row["curve"] == "answer length" and row["kind"] == "point"]
    by_answer = {row["x"]: row for row in answers if row["way"] == OURS}
    full = {row["x"]: row for row in answers if row["way"] == FULL}
    removed = full[1]["visual_tokens"] - full[1]["kept_tokens"]
    per_token = (by_answer[6]["kv_bytes"] - by_answer[1]["kv_bytes"]) / 5
    assert full[1]["kv_bytes"] - by_answer[1]["kv_bytes"] == removed * per_token

    depth = next(row for row in rows if row["kind"] == "share at full depth")
    layers = build_config("tiny-qwen2.5-vl").get_text_config().num_hidden_layers
    assert depth["full_layers"] == depth["layers"] == layers
    assert 0 < depth["reading_share_low"] <= depth["reading_share_high"] < 1

    paths = suite.figures(rows, tmp_path / "new")
    assert [path.stem for path in paths] == [curve.replace(" ", "-") for curve in suite.CURVES]
    assert all(2000 < path.stat().st_size < 60_000 for path in paths)


def test_the_vocabulary_makes_linear_reading_dearer_and_pruned_not():
    points = POINTS["vocabulary"](Growth(toy(), "tiny-qwen2.5-vl", SMALL, 20, 0.5, "pruned", quick=True))
    linear = [point.flops["reading, linear"] for point in points]
    pruned = [point.flops["reading, pruned"] for point in points]
    assert linear[0] < linear[1] < linear[2]
    assert len(set(pruned)) == 1


def test_a_tower_of_one_size_has_no_curve_over_sizes():
    rows = suite.run(toy("tiny"), "tiny", (336, 336), rounds=2, curves=["image size"], quick=True)
    assert [row["kind"] for row in rows] == ["note"]
    assert suite.figures(rows, "unused") == []


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="colour"):
        suite.run(toy(), "tiny-qwen2.5-vl", LARGE, curves=["colour"])


def test_a_sentence_says_whether_growth_agrees():
    x = [100.0, 200.0, 400.0]
    points = [
        suite.Point(value, {FULL: lambda: None}, {FULL: int(1e9 * value)}, {"visual_tokens": value}) for value in x
    ]
    same = fits.fit(x, np.array([x, x, x]) * 0.01, 2)
    row = suite._fit_row("image size", FULL, same, points)
    assert row["agrees"] and row["explanation"].endswith("growth agrees.")
    assert row["growth"] == pytest.approx(4) and row["flops_growth"] == pytest.approx(4)
    flat = fits.fit(x, np.ones((3, 3)), 2)
    row = suite._fit_row("image size", FULL, flat, points)
    assert not row["agrees"] and "grows less" in row["explanation"]
    wild = fits.fit(x, np.array([x, np.square(x) / 100, np.ones(3)]), 2)
    row = suite._fit_row("image size", FULL, wild, points)
    assert row["agrees"] is None and row["explanation"].endswith("differ too much to tell.")
