"""Run-length encoding is lossless, maximal, and stops at breaks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.processing.run_lengths import decode_runs, encode_runs, row_starts

sequences = st.lists(st.integers(0, 3), max_size=40)


@given(sequences, st.sets(st.integers(0, 40)))
def test_decoding_undoes_encoding_and_runs_are_maximal(values: list[int], breaks: set[int]) -> None:
    runs = encode_runs(values, breaks)
    assert decode_runs(runs) == values
    start = 0
    for (value, length), (following, _) in pairwise(runs):
        start += length
        assert length >= 1
        assert value != following or start in breaks
    inner = {place for place in breaks if 0 < place < len(values)}
    starts = {sum(length for _, length in runs[:number]) for number in range(len(runs))}
    assert inner <= starts


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=4), st.booleans())
def test_row_starts_are_the_first_cells_of_rows_or_blocks(grids: list[tuple[int, int]], wrap_rows: bool) -> None:
    expected, cell = [], 0
    for rows, cols in grids:
        for row in range(rows):
            if row == 0 or not wrap_rows:
                expected.append(cell)
            cell += cols
    assert row_starts(grids, wrap_rows) == expected


def test_the_worked_example_of_the_specification() -> None:
    sky, comma, dog, stop = range(4)
    cells = [sky, sky, comma, dog, dog, dog, comma, stop]
    assert [n for _, n in encode_runs(cells, row_starts([(2, 4)], wrap_rows=True))] == [2, 1, 3, 1, 1]
    assert [n for _, n in encode_runs(cells, row_starts([(2, 4)]))] == [2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("runs", [[(1, 0)], [(1, -2)], [(1, 2, 3)]])
def test_impossible_runs_are_refused(runs: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="every run must be"):
        decode_runs(runs)
