"""Run-length encoding of token grids, as plain lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def encode_runs(values: Sequence[int], breaks: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Write a sequence as (value, length) pairs of maximal runs of equal values.

    Args:
        values: any integers, for instance the token id of every cell of a grid in raster order.
        breaks: indices at which a new run starts even if the value goes on, see `row_starts`.

    Returns:
        The pairs in order; `decode_runs` gives `values` back.
    """
    forced = set(breaks)
    runs: list[tuple[int, int]] = []
    for index, value in enumerate(values):
        if runs and index not in forced and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def decode_runs(runs: Iterable[Sequence[int]]) -> list[int]:
    """Undo `encode_runs`: repeat every value by its length.

    Raises:
        ValueError: if a run is no (value, length) pair of positive length.
    """
    values: list[int] = []
    for run in runs:
        if len(run) != 2 or run[1] < 1:
            raise ValueError(f"every run must be a (value, length) pair with length >= 1, got {tuple(run)}.")
        values += [run[0]] * run[1]
    return values


def row_starts(grids: Iterable[Sequence[int]], wrap_rows: bool = False) -> list[int]:
    """Indices at which a grid row starts, in the sequence of all cells.

    Args:
        grids: (rows, cols) of every feature block, in sequence order.
        wrap_rows: let runs continue at the start of the next row, so that only block starts are listed.

    Returns:
        Ascending indices, to be given to `encode_runs` as `breaks`.
    """
    starts: list[int] = []
    first = 0
    for rows, cols in grids:
        step = rows * cols if wrap_rows else cols
        starts += range(first, first + rows * cols, step) if step else []
        first += rows * cols
    return starts
