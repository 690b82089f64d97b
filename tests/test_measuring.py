import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualstream.measuring import Clock, count_work, interleaved, median_ratio, peak_bytes, timing


class CountingClock(Clock):
    """A clock on which every function takes as long as it says."""

    def seconds(self, function):
        return float(function())


def test_every_way_runs_once_a_round_in_changing_order():
    order = []
    ways = {name: lambda name=name: order.append(name) or len(name) for name in ("a", "bb", "ccc")}
    seconds = interleaved(ways, rounds=20, warmup=2, clock=CountingClock())
    assert {name: values.tolist() for name, values in seconds.items()} == {n: [len(n)] * 20 for n in ways}
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 22 and all(sorted(turn) == ["a", "bb", "ccc"] for turn in rounds)
    assert len(set(rounds)) > 2
    with pytest.raises(ValueError, match="rounds=1"):
        interleaved(ways, rounds=1)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30), st.floats(0.5, 2))
def test_ratio_of_a_scaled_series_is_the_scale(values, factor):
    series = np.array(values)
    found = median_ratio(series * factor, series)
    assert all(value == pytest.approx(factor) for value in found.values())


def test_interval_of_the_ratio_covers_the_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        one, other = np.exp(rng.normal(0.1, 0.2, 25)), np.exp(rng.normal(0, 0.2, 25))
        found = median_ratio(one, other, seed)
        covered += found["low"] <= np.exp(0.1) <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_ratio_needs_pairs():
    with pytest.raises(ValueError, match="must pair rounds"):
        median_ratio(np.ones(3), np.ones(2))


def test_timing_is_in_milliseconds():
    assert timing(np.array([0.001, 0.002, 0.003, 0.004, 0.005])) == {
        "median_ms": 3.0,
        "q1_ms": 2.0,
        "q3_ms": 4.0,
        "rounds": 5,
    }


def test_work_is_counted():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    counts = count_work(lambda: (a @ b).relu())
    assert counts.flops == 2 * 8 * 16 * 4 and counts.by_name == {"mm": 1, "relu": 1} and counts.waits == 0


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: int(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).any()),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_what_makes_the_host_wait_is_counted(waiting):
    assert count_work(lambda: waiting(torch.ones(5))).waits == 1


def test_peak_counts_what_lives_at_once_and_views_only_once():
    def function():
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        third = second.view(10, 100)  # a view
        return third * 2  # 8000 again

    assert peak_bytes(function) == 8000
