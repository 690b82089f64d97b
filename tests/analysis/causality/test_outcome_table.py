"""Figures of a table against counts by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from dualstream.analysis.causality.outcome_table import (
    add_holm,
    against_baseline,
    baseline_of,
    paired_destruction,
)

BASE = [True] * 8 + [False] * 2


def frame(correct, draws=1, margin=1.0):
    rows = [
        {
            "image": f"p{image}",
            "draw": draw,
            "correct": bool(value),
            "margin": margin * (image + draw),
            "probability": 0.5,
        }
        for draw in range(draws)
        for image, value in enumerate(correct)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def base():
    found, facts = baseline_of(frame(BASE))
    assert facts["accuracy"]["value"] == 0.8 and facts["accuracy"]["n"] == 10
    return found


def test_destruction_counts_only_what_was_right(base):
    treated = [True, True, False, False, False, False, True, True, True, False]
    found = against_baseline(frame(treated, margin=2.0), base)
    assert found["destroyed"]["value"] == pytest.approx(4 / 8) and found["destroyed"]["n"] == 8
    assert found["accuracy"]["value"] == 0.5 and found["images"] == 10
    assert (found["test"]["lost"], found["test"]["gained"]) == (4, 1)
    assert found["test"]["p_value"] == pytest.approx(binomtest(1, 5).pvalue)
    assert found["margin_change"]["value"] == pytest.approx(np.mean(range(10)))
    low, high = binomtest(4, 8).proportion_ci(0.95, "wilson")
    assert (found["destroyed"]["low"], found["destroyed"]["high"]) == (pytest.approx(low), pytest.approx(high))


def test_missing_margins_and_nothing_right(base):
    rows = frame([False] * 10)
    rows["margin"] = np.nan
    found = against_baseline(rows, base)
    assert found["margin_change"] is None and found["probability"] is None and found["destroyed"]["value"] == 1.0
    nothing, _ = baseline_of(frame([False] * 10))
    assert against_baseline(rows, nothing)["destroyed"] is None
    with pytest.raises(ValueError, match="several rows"):
        baseline_of(frame(BASE, draws=2))


def test_pairs_average_draws_and_take_shared_right_images(base):
    treated = frame([False] * 10)
    control = frame([True] * 10, draws=2)
    control.loc[(control["draw"] == 1) & (control["image"] == "p0"), "correct"] = False
    found = paired_destruction(treated, control[control["image"] != "p7"], base)
    assert found["n"] == 7 and found["value"] == pytest.approx((6 + 0.5) / 7)
    assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1 and found["p_value"] < 0.05
    assert paired_destruction(treated, control[control["image"] == "p9"], base) is None


def test_holm_is_over_all_entries_and_skips_missing_ones():
    entries = [{"test": {"p_value": p}} for p in (0.01, 0.04, 0.03)] + [{"test": None}]
    add_holm(entries, "test", "p_value")
    assert [round(entry["test"]["p_holm"], 3) for entry in entries[:3]] == [0.03, 0.06, 0.06]
    add_holm([{"test": None}], "test", "p_value")
