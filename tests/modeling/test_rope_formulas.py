"""RopeScaling: published numbers, identities between the types, round trips and errors."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.modeling import RopeScaling
from dualstream.modeling.rope_formulas import AXES, PARAMETERS

RATIOS = torch.arange(20, dtype=torch.float64) / 20  # Qwen2-VL: 40 channels per axis
THETA = 10000**-RATIOS


def g(text, ratios=RATIOS):
    return RopeScaling.from_any(text).factors(ratios)[0, 0]


@pytest.mark.parametrize(
    ("text", "index", "expected"),
    [
        ("poly:99:8", 10, 1.387),
        ("poly:99:8", 12, 2.663),
        ("poly:99:8", 15, 10.911),
        ("poly:99:8", 19, 66.679),
        ("poly:99:6", 10, 2.547),
        ("poly:99:6", 15, 18.620),
        ("poly:99:6", 19, 73.774),
        ("poly:99:10", 19, 60.275),
        ("poly:49:8", 19, 33.508),
        ("poly:199:6", 19, 147.283),
        ("poly:9:24", 19, 3.628),
        ("linear:1", 19, 1.95),
        ("exp:2", 19, 1.932),
    ],
)
def test_published_factors(text, index, expected):
    assert float(g(text)[index]) == pytest.approx(expected, abs=6e-4)


def test_published_frequencies():
    scaled = THETA * g("poly:99:8")
    assert float(scaled[10:].min()) + 5e-5 >= 0.0104 and float(scaled[10:].max()) <= 0.0139 + 5e-5
    assert float((82 * scaled[10:]).max()) == pytest.approx(1.14, abs=6e-3)
    assert float(82 * scaled[10:].min()) == pytest.approx(0.86, abs=6e-3)
    assert float((THETA * g("poly:99:6"))[19]) == pytest.approx(0.01169, abs=6e-6)
    assert float((THETA * g("poly:199:6"))[19]) == pytest.approx(0.0233, abs=6e-5)
    assert float((THETA * g("poly:49:8"))[19]) == pytest.approx(0.0053, abs=6e-5)
    assert bool(((THETA * g("poly:49:8")).diff() < 0).all())
    dipping = THETA * g("poly:99:10")
    assert int(dipping.argmin()) == 13
    assert [float(dipping[13]), float(dipping[19])] == pytest.approx([0.0059, 0.0096], abs=6e-5)
    assert float((THETA * g("sigmoid:99:0.5:20"))[10]) == pytest.approx(0.505, abs=6e-4)
    assert float((THETA * g("sigmoid:99:0.6:40"))[8:].max()) == pytest.approx(0.22, abs=6e-3)
    assert int((THETA * g("sigmoid:99:0.6:40"))[8:].argmax()) + 8 == 13
    assert math.sin(27 * float(THETA[19])) == pytest.approx(0.0043, abs=6e-5)
    assert math.sin(27 * float((THETA * g("poly:99:8"))[19])) == pytest.approx(0.28, abs=6e-3)


@settings(deadline=None)
@given(st.floats(1.5, 1e6), st.floats(1.5, 1e6), st.floats(0.01, 2))
def test_exp_is_another_base_and_a_power_of_theta(old, new, beta):
    theta = old**-RATIOS
    rebased = theta * RopeScaling("exp", gamma=old / new).factors(RATIOS)[0, 0]
    torch.testing.assert_close(rebased, new**-RATIOS)
    torch.testing.assert_close(RopeScaling("exp", gamma=old**beta).factors(RATIOS)[0, 0], theta**-beta)


def test_published_rebase_and_inverse():
    assert float(g(f"exp:{10000 / 512}")[19]) == pytest.approx(16.834, abs=6e-4)
    assert float(g(f"exp:{10000**0.1}")[19]) == pytest.approx(2.399, abs=6e-4)


def scalings():
    above = lambda bound: st.floats(bound, 1e4, exclude_min=True)
    finite = st.floats(-1e4, 1e4)
    axes = st.sampled_from(list(AXES))
    formulas = st.one_of(
        st.builds(RopeScaling, st.just("poly"), alpha=above(-1), p=above(0), axes=axes),
        st.builds(RopeScaling, st.just("sigmoid"), alpha=above(-1), midpoint=finite, slope=finite, axes=axes),
        st.builds(RopeScaling, st.just("linear"), alpha=above(-1), axes=axes),
        st.builds(RopeScaling, st.just("exp"), gamma=above(0), axes=axes),
    )
    return formulas


@st.composite
def tables(draw):
    axes = draw(st.sampled_from(list(AXES)))
    grid_sizes = draw(st.none() | st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True).map(sorted))
    count = draw(st.integers(1, 5))
    shape = [len(grid_sizes or (0,)), len(AXES[axes]), count][draw(st.integers(0, 2)) :]
    flat = draw(st.lists(st.floats(1e-3, 1e3), min_size=math.prod(shape), max_size=math.prod(shape)))
    values = torch.tensor(flat, dtype=torch.float64).reshape(shape)
    return RopeScaling("table", values=values, axes=axes, grid_sizes=grid_sizes, learned=draw(st.booleans()))


@settings(deadline=None)
@given(st.one_of(scalings(), tables()))
def test_dict_round_trip(scaling):
    assert RopeScaling.from_any(json.loads(json.dumps(scaling.to_dict()))) == scaling
    assert hash(RopeScaling.from_any(scaling)) == hash(scaling)


@settings(deadline=None)
@given(scalings())
def test_string_round_trip(scaling):
    assert RopeScaling.from_any(str(scaling)) == scaling


@settings(deadline=None)
@given(scalings())
def test_factors_are_positive_and_identity_is_all_ones(scaling):
    factors = scaling.factors(RATIOS)
    assert factors.shape == (1, len(scaling.scaled_axes), 20)
    assert factors.dtype == torch.float64
    assert bool((factors > 0).all())
    assert not scaling.is_identity or bool((factors == 1).all())


@settings(deadline=None)
@given(st.floats(0, 1e3), st.floats(0.1, 30))
def test_poly_brute_force(alpha, p):
    expected = [1 + alpha * (i / 20) ** p for i in range(20)]
    assert RopeScaling("poly", alpha=alpha, p=p).factors(RATIOS)[0, 0].tolist() == pytest.approx(expected)


@settings(deadline=None)
@given(tables())
def test_table_factors_are_its_values(scaling):
    count = torch.tensor(scaling.values).shape[-1]
    factors = scaling.factors(torch.arange(count) / count)
    values = torch.tensor(scaling.values, dtype=torch.float64)
    for table in range(factors.shape[0]):
        for axis in range(factors.shape[1]):
            row = values if values.ndim == 1 else values[axis] if values.ndim == 2 else values[table, axis]
            assert factors[table, axis].tolist() == row.tolist()


def test_strings():
    assert RopeScaling.from_any("poly") == RopeScaling("poly", alpha=99, p=8) == RopeScaling()
    assert RopeScaling.from_any("poly:49") == RopeScaling("poly", alpha=49, p=8)
    assert RopeScaling.from_any("poly:49:6:h") == RopeScaling("poly", alpha=49, p=6, axes="h")
    assert RopeScaling.from_any("sigmoid:9:0.5:20:w") == RopeScaling(
        "sigmoid", alpha=9, midpoint=0.5, slope=20, axes="w"
    )
    assert RopeScaling.from_any("table:49:6") == RopeScaling("table", alpha=49, p=6, learned=True)
    assert str(RopeScaling()) == "poly:99:8"
    assert str(RopeScaling("exp", gamma=0.1, axes="w")) == "exp:0.1:w"
    assert set(PARAMETERS) == {"poly", "sigmoid", "linear", "exp", "table"}


@pytest.mark.parametrize("text", ["poly:0", "linear:0", "sigmoid:0", "exp:1"])
def test_identity_of_formulas(text):
    assert RopeScaling.from_any(text).is_identity


def test_identity_of_tables():
    assert RopeScaling("table", values=(1, 1)).is_identity
    assert not RopeScaling("table", values=(1, 2)).is_identity
    assert not RopeScaling("table", values=(1, 1), learned=True).is_identity
    assert not RopeScaling("table", alpha=0, learned=True).is_identity


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": "sig"}, "'sig' is unknown; known are poly, sigmoid, linear, exp, table"),
        ({"axes": "t"}, "axes 't' is unknown; known are both, h, w"),
        ({"type": "gamma"}, "unknown"),
        ({"alpha": -1}, "alpha must be above -1"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"alpha": "9"}, "alpha must be a finite number"),
        ({"alpha": True}, "alpha must be a finite number"),
        ({"p": 0}, "p must be above 0"),
        ({"type": "exp", "gamma": 0}, "gamma must be above 0"),
        ({"type": "exp", "alpha": 9}, "alpha=9 is no parameter"),
        ({"type": "poly", "learned": True}, "belong to type 'table'"),
        ({"type": "poly", "values": (1, 2)}, "belong to type 'table'"),
        ({"type": "poly", "grid_sizes": (8,)}, "belong to type 'table'"),
        ({"type": "table"}, "needs values"),
        ({"type": "table", "values": (1, 0)}, "positive and finite"),
        ({"type": "table", "values": (1, math.inf)}, "positive and finite"),
        ({"type": "table", "values": ((1, 2), (1,))}, "equal lengths"),
        ({"type": "table", "values": ()}, "shape"),
        ({"type": "table", "values": ((1, 2), (1, 2)), "axes": "h"}, "shape (2, 2)"),
        ({"type": "table", "values": (((1, 2), (1, 2)),), "grid_sizes": (4, 8)}, "shape (1, 2, 2)"),
        ({"type": "table", "values": (1, 2), "alpha": 9}, "alpha=9 is no parameter"),
        ({"type": "table", "learned": True, "grid_sizes": ()}, "ascending"),
        ({"type": "table", "learned": True, "grid_sizes": (8, 4)}, "ascending"),
        ({"type": "table", "learned": True, "grid_sizes": (1.5,)}, "ascending"),
        ({"type": "poly", "beta": 1}, "no field beta"),
    ],
)
def test_errors_name_the_argument(settings, words):
    with pytest.raises(ValueError) as error:
        RopeScaling.from_any(settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown"),
        ("rebase:512", "unknown"),
        ("poly:99:8:9", "3 numbers, but 'poly' takes alpha, p"),
        ("poly:99:q", "p='q'"),
        ("poly::8", "alpha=''"),
    ],
)
def test_string_errors(text, words):
    with pytest.raises(ValueError) as error:
        RopeScaling.from_any(text)
    assert words in str(error.value)


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="not 3"):
        RopeScaling.from_any(3)


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match="values has 2 frequencies, but the tower has 20"):
        RopeScaling("table", values=(1, 2)).factors(RATIOS)
