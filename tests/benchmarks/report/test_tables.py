"""Tables from any rows: nothing measured is lost, spreads stand behind their figures."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.benchmarks.report.tables import number, rows_table, significant, size


@given(st.floats(-1e12, 1e12, allow_nan=False))
def test_three_digits_tell_the_number(value):
    shown = float(significant(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.0051)


def test_bytes_have_a_unit():
    assert size(512) == "0.5 KiB"
    assert size(3 * 2**20) == "3.00 MiB"
    assert size(5.5 * 2**30) == "5.50 GiB"


def cells(table):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    head, _, *body = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in body]


def test_spreads_stand_behind_their_figures():
    rows = [
        {"suite": "s", "way": "a", "median_ms": 12.34, "q1_ms": 11.0, "q3_ms": 13.0, "ratio": 1.5, "ratio_low": 1.25,
         "ratio_high": 1.75, "ratio_to": "b", "kv_bytes": 2**21, "share_of_prefill": {"value": 0.1, "low": 0.05,
         "high": 0.2}},
        {"suite": "s", "way": "b", "median_ms": 8.0, "extra": True, "reduction": 0.49},
    ]  # fmt: skip
    assert cells(rows_table(rows)) == [
        {"way": "a", "fewer visual tokens %": "", "median ms [quartiles]": "12.3 [11.0, 13.0]",
         "ratio to b [95 %]": "1.500 [1.250, 1.750]", "keys and values": "2.00 MiB",
         "of prefill %": "10.0 [5.00, 20.0]", "extra": ""},
        {"way": "b", "fewer visual tokens %": "49", "median ms [quartiles]": "8.00", "ratio to b [95 %]": "",
         "keys and values": "", "of prefill %": "", "extra": "yes"},
    ]  # fmt: skip


def test_several_references_of_a_ratio_have_a_column():
    rows = [{"way": "a", "ratio": 2.0, "ratio_to": "x"}, {"way": "b", "ratio": 3.0, "ratio_to": "y"}]
    assert [row["ratio to"] for row in cells(rows_table(rows))] == ["x", "y"]
    assert [row["ratio"] for row in cells(rows_table(rows))] == ["2.000", "3.000"]


def test_settings_that_are_the_same_everywhere_are_said_once():
    rows = [{"way": "a", "batch": 8, "reduction": 0.16, "operations": 5}, {"way": "b", "batch": 8, "reduction": 0.16,
            "operations": 5}]  # fmt: skip
    table = rows_table(rows)
    assert table.startswith("Everywhere: batch 8, fewer visual tokens 16 %.\n\n|")
    assert cells(table) == [{"way": "a", "operations": "5"}, {"way": "b", "operations": "5"}]
    assert "Everywhere" not in rows_table(rows[:1])


def test_a_setting_that_a_row_lacks_is_not_everywhere():
    rows = [{"way": "a", "batch": 8}, {"way": "b"}]
    assert cells(rows_table(rows)) == [{"way": "a", "batch": "8"}, {"way": "b", "batch": ""}]


def test_what_is_no_cell_is_left_out_and_pipes_do_not_break_the_table():
    rows = [{"way": "a|b", "counts": {"mm": 3}, "points": list(range(50)), "few": [1, 2.5]}]
    assert rows_table(rows).splitlines()[-1] == "| a\\|b | 1, 2.50 |"


@given(st.integers(0, 10**9))
def test_counts_are_exact(value):
    assert int(number(value).replace(",", "")) == value


def test_whole_numbers_have_no_fraction_but_times_do():
    assert number(64.0, "visual_tokens") == "64" and number(8.0, "median_ms") == "8.00"
    assert size(0) == "0"
    assert number(1_500_000_000, "flops") == "1.50"


def test_a_ratio_without_an_interval_promises_none():
    assert cells(rows_table([{"way": "a", "ratio": 2.0, "ratio_to": "b"}])) == [{"way": "a", "ratio to b": "2.000"}]
