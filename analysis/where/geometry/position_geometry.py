"""E1 and E2: is there a straight, orthogonal map of places in the position embeddings, and how far does it reach?

A table of learned positions is looked at as it is. A rotary tower has none, so for every model the field of *induced*
features is looked at too: the mean state of every place over many pictures. Each picture is rolled around its borders
by a random shift first, so that no place has a content of its own; what differs between places then comes from the
position embeddings (and from the picture's border).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dualstream.eval.statistics import Estimate, bootstrap_mean, cluster_bootstrap_mean

from ..bench import NEUTRAL_PROMPT
from ..experiment import Experiment, Finding, ReportTable, above, below, pending
from ..states import CONNECTOR, LLM, VISION, Place, all_places, read_pictures
from ..vision_states import learned_table
from . import position_figures
from .position_measures import (
    AXES,
    consistency,
    cosine,
    crossing_cosines,
    decoded_lines,
    null_range,
    opposite_cosines,
    shuffled,
    steps_of,
)
from .position_reading import CellReader, blocks_of_grid, dominant_grid, rolled

if TYPE_CHECKING:
    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench

TABLE = "table"
DRAWS, FIELD_DRAWS, R2_DRAWS = 200, 40, 10
CELLS = 2048  # training cells of a linear reader, over all pictures
STRAIGHT, STEADY, READABLE = -0.5, 0.5, 0.5


class PositionGeometry(Experiment):
    """Geometry and persistence of positions."""

    name = "position_geometry"
    title = "E1, E2: geometry and persistence of position"
    question = (
        "Do steps along an axis of the picture have one direction in the model's space, opposite for opposite steps "
        "and orthogonal to those along the other axis? And can the place of a token still be read off its state "
        "further on? Cosines are taken in the full space and compared with the same cells at shuffled places; two "
        "displacements from one origin share a vector, so without any order their cosine is +0.5, not 0."
    )

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """See ``Experiment``; the units are the learned table and the stages of the way."""
        for unit in pending([TABLE, VISION, LLM], rows, self.title):
            rows.write(unit, list(self._table(bench) if unit == TABLE else self._stage(bench, unit)))

    def _table(self, bench: Bench) -> Iterator[dict[str, Any]]:
        field = learned_cells(bench.model)
        if field is not None:
            place = Place(-1, TABLE, 0)
            yield from field_rows(field, place, steps_of(*field.shape[:2]), DRAWS, bench.seed)
            yield from decoding_rows(field, place, R2_DRAWS, bench.seed)
            yield from picture_rows(field, place)

    def _stage(self, bench: Bench, stage: str) -> Iterator[dict[str, Any]]:
        places = [place for place in all_places(bench) if (place.stage == LLM) == (stage == LLM)]
        train = [item for pair in bench.calibration for item in pair.items]
        test = [pair.items[number % 4] for number, pair in enumerate(bench.pairs)]
        readers: dict[Place, CellReader] = {}
        grid = dominant_grid(bench, train)
        per_picture = max(1, CELLS // len(train))
        for states in _rolled_states(bench, train, places, grid):
            for place, cells in states.items():
                reader = readers.setdefault(place, CellReader(grid, bench.seed))
                reader.add(cells, per_picture)
        quarter = [step for step in (1, grid[1] // 4) if step >= 1 and 2 * step < min(grid)]
        for place, reader in readers.items():
            reader.fit()
            yield from field_rows(reader.field, place, sorted(set(quarter)), FIELD_DRAWS, bench.seed)
            if place.number == max(p.number for p in places if p.stage != CONNECTOR):
                yield from picture_rows(reader.field, place)
        table = token_table(bench.model, grid) if stage == VISION else None
        found: dict[Place, list[dict[str, float]]] = {place: [] for place in places}
        for states in _rolled_states(bench, test, places, grid):
            for place, cells in states.items():
                measured = readers[place].measure(cells)
                if table is not None and place.stage == VISION:
                    measured |= table_projections(cells, table, bench.seed)
                found[place].append(measured)
        for place, pictures in found.items():
            for measure in (name for name in pictures[0] if not name.endswith(" null")):
                estimate = bootstrap_mean(np.array([each[measure] for each in pictures]))
                null = bootstrap_mean(np.array([each[f"{measure} null"] for each in pictures]))
                name, axis = ("image r2", measure) if measure in AXES else (measure, "")
                yield _row(place, name, axis, 0, estimate, (null.value, null.low, null.high))

    def summarize(self, table: pa.Table) -> list[Finding]:
        """See ``Experiment``: the table where there is one, the deepest tower state, connector and language model."""
        rows = table.to_pylist()
        findings: list[Finding] = []
        if any(row["stage"] == TABLE for row in rows):
            findings += _geometry_findings(rows, TABLE, 0, "the learned position table")
        last = max(row["depth"] for row in rows if row["stage"] == VISION)
        findings += _geometry_findings(rows, VISION, last, f"mean tower states per place (depth {last})")
        deepest = max(row["depth"] for row in rows if row["stage"] == LLM)
        for stage, depth, name in (
            (CONNECTOR, 0, "the connector's output"),
            (LLM, deepest, f"the language model's last states (depth {deepest})"),
        ):
            findings += [_reading_finding(rows, stage, depth, axis, name) for axis in AXES]
        return findings

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """See ``Experiment``."""
        rows = table.to_pylist()
        reading = ReportTable(
            "Place of a token read off its state, in pictures that the reader never saw",
            (
                "stage",
                "depth",
                "R² row",
                "R² column",
                "R² row, shuffled",
                "share of variance that is place",
                "shuffled",
            ),
            note="Intervals over pictures. Share: of the states' variance, what the mean state of the place explains.",
        )
        left = ReportTable(
            "What is left of a place's learned embedding in its state",
            ("depth", "cosine, centred", "shuffled", "the paper's projection", "shuffled"),
            note="Shuffled: embeddings of other places; under the projection, what their shared mean alone gives.",
        )
        for _, stage, depth in sorted({(row["number"], row["stage"], row["depth"]) for row in rows}):
            own = (row for row in rows if (row["stage"], row["depth"]) == (stage, depth))
            here = {(row["measure"], row["axis"]): row for row in own}
            if ("share", "") in here:
                row, col, share = here["image r2", "row"], here["image r2", "col"], here["share", ""]
                cells = (estimate_of(row), estimate_of(col), row["null_value"], estimate_of(share))
                reading.rows.append((stage, depth, *cells, share["null_value"]))
            if ("cosine", "") in here:
                cosine_, projection = here["cosine", ""], here["projection", ""]
                shown = (estimate_of(cosine_), cosine_["null_value"], estimate_of(projection))
                left.rows.append((depth, *shown, projection["null_value"]))
        return [reading, left] if left.rows else [reading]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """See ``Experiment``."""
        return position_figures.draw(table.to_pylist(), folder)


def learned_cells(model: Any) -> np.ndarray | None:
    """The learned position embeddings of a tower, (rows, cols, d) float64 without class token; None if it has none."""
    table = learned_table(model)
    if table is None:
        return None
    cells = table.detach().float().cpu().numpy().astype(np.float64).reshape(-1, table.shape[-1])
    side = int(np.sqrt(len(cells)))
    return cells[len(cells) - side * side :].reshape(side, side, -1)


def token_table(model: Any, grid: tuple[int, int]) -> np.ndarray | None:
    """The learned table per visual token (mean over the patches of each); None if there is none or it does not fit."""
    table = learned_cells(model)
    if table is None or table.shape[0] % grid[0] or table.shape[1] % grid[1]:
        return None
    rows, cols = grid
    return table.reshape(rows, table.shape[0] // rows, cols, table.shape[1] // cols, -1).mean((1, 3))


def table_projections(cells: np.ndarray, table: np.ndarray, seed: int) -> dict[str, float]:
    """How much of a place's embedding is left in its state: the paper's projection, and a cosine of centred vectors.

    Args:
        cells: (rows, cols, d) states of a picture.
        table: (rows, cols, d) embeddings.
        seed: of the shuffled embeddings of the control.

    Returns:
        ``projection``: mean of <p, h> / |h| (the paper's measure: a shared mean direction counts); ``cosine``: mean
        cosine after each is centred over the places; and both for shuffled p.
    """
    wrong = shuffled(table, np.random.default_rng(seed))
    found = {}
    for suffix, own in (("", table), (" null", wrong)):
        found[f"projection{suffix}"] = float(
            ((own * cells).sum(-1) / np.maximum(np.linalg.norm(cells, axis=-1), 1e-12)).mean()
        )
        found[f"cosine{suffix}"] = float(cosine(own - own.mean((0, 1)), cells - cells.mean((0, 1))).mean())
    return found


def field_rows(
    field: np.ndarray, place: Place, steps: Sequence[int], draws: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Cosines of a field at several steps, with intervals over origins and the range over shuffled places."""
    for step in steps:
        for axis in AXES:
            yield _cosine_row(field, place, "opposite", axis, step, draws, seed)
            yield _cosine_row(field, place, "consistency", axis, step, draws, seed)
        yield _cosine_row(field, place, "crossing", "", step, draws, seed)


def decoding_rows(field: np.ndarray, place: Place, draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """R² of row and column on held-out lines of a field, and over shuffled places."""
    for axis in AXES:

        def decoded(cells: np.ndarray, axis: str = axis) -> float:
            return float(decoded_lines(cells, axis).mean())

        null = null_range(decoded, field, draws, seed)
        yield _row(place, "line r2", axis, 0, bootstrap_mean(decoded_lines(field, axis)), null)


def picture_rows(field: np.ndarray, place: Place) -> Iterator[dict[str, Any]]:
    """Two principal components of a field's cells, for an illustration."""
    rows, cols, width = field.shape
    centred = field.reshape(-1, width) - field.reshape(-1, width).mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    for number in (0, 1):
        part = Estimate(float(sizes[number] ** 2 / (sizes**2).sum()), np.nan, np.nan, rows * cols)
        row = _row(place, f"component {number + 1}", "", cols, part, (np.nan, np.nan, np.nan))
        yield row | {"points": (left[:, number] * sizes[number]).tolist()}


def estimate_of(row: dict[str, Any]) -> Estimate:
    """The estimate in a row."""
    return Estimate(row["value"], row["low"], row["high"], row["n"])


def null_of(row: dict[str, Any]) -> Estimate:
    """What shuffled places give."""
    return Estimate(row["null_value"], row["null_low"], row["null_high"], row["n"])


def _cosine_row(
    field: np.ndarray, place: Place, measure: str, axis: str, step: int, draws: int, seed: int
) -> dict[str, Any]:
    def values(cells: np.ndarray) -> np.ndarray:
        if measure == "crossing":
            return crossing_cosines(cells, step)
        return (opposite_cosines if measure == "opposite" else consistency)(cells, axis, step)

    found = values(field)
    row, col = np.divmod(np.arange(found.size), found.shape[1])
    estimate = cluster_bootstrap_mean(found.ravel(), row, col, seed=seed, resamples=500)
    return _row(
        place, measure, axis, step, estimate, null_range(lambda cells: float(values(cells).mean()), field, draws, seed)
    )


def _row(
    place: Place, measure: str, axis: str, step: int, estimate: Estimate, null: Sequence[float] | np.ndarray
) -> dict[str, Any]:
    return {
        "number": place.number,
        "stage": place.stage,
        "depth": place.depth,
        "measure": measure,
        "axis": axis,
        "step": step,
        **estimate.to_dict(),
        **{f"null_{name}": float(value) for name, value in zip(("value", "low", "high"), null, strict=True)},
        "points": [],
    }


def _rolled_states(
    bench: Bench, items: Sequence[Any], places: Sequence[Place], grid: tuple[int, int]
) -> Iterator[dict[Place, np.ndarray]]:
    """Per block of the grid's size: place -> states (rows, cols, d) of a picture rolled by a random shift."""
    rng = np.random.default_rng([bench.seed, len(items)])
    for batch in bench.batches(items):
        pictures = [rolled(item.image(), rng) for item in batch]
        for item, states in zip(batch, read_pictures(bench, pictures, NEUTRAL_PROMPT, places), strict=True):
            yield from blocks_of_grid(bench.geometry(bench.size(item)).grids, grid, states)


def _geometry_findings(rows: list[dict[str, Any]], stage: str, depth: int, name: str) -> list[Finding]:
    here = [row for row in rows if (row["stage"], row["depth"]) == (stage, depth)]
    quarter = next(row["step"] for row in here if row["measure"] == "component 1") // 4  # its step is the width
    step = max(row["step"] for row in here if row["measure"] == "crossing" and row["step"] <= quarter)
    cosines = {(row["measure"], row["axis"]): row for row in here if row["step"] == step}
    shuffle = "cells at shuffled places"
    findings = []
    for axis in AXES:
        row = cosines["opposite", axis]
        findings.append(
            Finding(
                f"In {name}, opposite steps of {step} along the {_word(axis)} axis point opposite ways.",
                estimate_of(row),
                below(estimate_of(row), STRAIGHT),
                f"yes: interval below {STRAIGHT}; no: above it",
                null_of(row),
                shuffle,
                "cosine",
            )
        )
    row = cosines["crossing", ""]
    findings.append(
        Finding(
            f"In {name}, steps of {step} along the two axes are orthogonal.",
            estimate_of(row),
            _within(estimate_of(row), 0.2),
            "yes: interval within ±0.2; no: outside it",
            null_of(row),
            shuffle,
            "cosine",
        )
    )
    for axis in AXES:
        row = cosines["consistency", axis]
        findings.append(
            Finding(
                f"In {name}, a step of {step} along the {_word(axis)} axis has one direction wherever it starts.",
                estimate_of(row),
                above(estimate_of(row), STEADY),
                f"yes: interval above {STEADY}; no: below it",
                null_of(row),
                shuffle,
                "cosine",
            )
        )
    return findings


def _reading_finding(rows: list[dict[str, Any]], stage: str, depth: int, axis: str, name: str) -> Finding:
    row = next(
        row
        for row in rows
        if (row["stage"], row["depth"], row["measure"], row["axis"]) == (stage, depth, "image r2", axis)
    )
    return Finding(
        f"A token's {axis if axis == 'row' else 'column'} can be read linearly off {name}.",
        estimate_of(row),
        above(estimate_of(row), READABLE),
        f"yes: interval of R² above {READABLE}; no: below it",
        null_of(row),
        "reader trained on shuffled places",
        "R²",
    )


def _within(estimate: Estimate, bound: float) -> str:
    if -bound < estimate.low and estimate.high < bound:
        return "yes"
    return "no" if estimate.low > bound or estimate.high < -bound else "open"


def _word(axis: str) -> str:
    return "vertical" if axis == "row" else "horizontal"
