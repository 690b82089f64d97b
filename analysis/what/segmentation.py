"""Words to regions: a label for every cell, holes filled by the neighbours, and how well that outlines the objects.

Rules, all on a frozen copy, so that no order of cells matters:

1. A cell whose word names a label has it.
2. Any other cell looks at its eight neighbours in the same block; those across an edge weigh 1, those across a corner
   1/2. It takes the label with the largest weight if that is more than half of the weight of all neighbours there are;
   of equals the one with the larger weight across edges, then the first of the schema.
3. What is left is background.

So holes and single specks are filled and no region grows outwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualstream.eval.statistics import Estimate, bootstrap_ratio
from dualstream.processing import TokenGeometry

from .labels import BACKGROUND_COLOR, LabelSchema

BACKGROUND = -1
_EDGES = ((0, 1), (1, 0), (0, -1), (-1, 0))
_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def fill_holes(labels: np.ndarray, grids: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """Give unlabelled cells the label of most of their neighbours.

    Args:
        labels: (..., N) labels that cells say, -1 for none; N cells of the blocks one after the other, by rows.
        grids: (rows, columns) of every block.
        count: number of labels.

    Returns:
        (..., N) int64; -1 is background.
    """
    labels = np.asarray(labels, np.int64)
    filled, start = np.empty_like(labels), 0
    for rows, columns in grids:
        part = labels[..., start : start + rows * columns].reshape(*labels.shape[:-1], rows, columns)
        filled[..., start : start + rows * columns] = _fill_block(part, count).reshape(*labels.shape[:-1], -1)
        start += rows * columns
    return filled


def _fill_block(labels: np.ndarray, count: int) -> np.ndarray:
    said = labels[..., None] == np.arange(count)  # (..., rows, columns, C)
    present = np.ones((*labels.shape, 1))
    edges, corners = (_neighbours(said.astype(float), steps) for steps in (_EDGES, _CORNERS))
    weight = _neighbours(present, _EDGES) + 0.5 * _neighbours(present, _CORNERS)
    votes = edges + 0.5 * corners
    best = np.argmax(votes + 1e-3 * edges, axis=-1)  # 1e-3 breaks ties only: votes come in steps of 1/2
    wins = np.take_along_axis(votes, best[..., None], -1)[..., 0] > 0.5 * weight[..., 0]
    return np.where(labels >= 0, labels, np.where(wins, best, BACKGROUND))


def _neighbours(values: np.ndarray, steps: Sequence[tuple[int, int]]) -> np.ndarray:
    """Sum (..., rows, columns, C) over neighbours, those beyond the border counted as 0."""
    rows, columns = values.shape[-3:-1]
    padded = np.pad(values, [*[(0, 0)] * (values.ndim - 3), (1, 1), (1, 1), (0, 0)])
    return sum(padded[..., 1 + down : 1 + down + rows, 1 + right : 1 + right + columns, :] for down, right in steps)  # type: ignore[return-value]


def cells_to_pixels(cells: np.ndarray, geometry: TokenGeometry) -> np.ndarray:
    """Spread a map of cells over the original image; every pixel takes the cell that looks at its centre.

    Args:
        cells: (N,) values.
        geometry: where the cells look; a thumbnail is left out.

    Returns:
        (H, W) of the dtype of `cells`; -1 where no cell looks (cropped away).
    """
    width, height = geometry.image_size
    pixels, start = np.full((height, width), -1, cells.dtype), 0
    for block in geometry.blocks:
        values = cells[start : start + block.rows * block.cols].reshape(block.rows, block.cols)
        start += block.rows * block.cols
        if block.thumbnail:
            continue
        row = np.floor((np.arange(height) + 0.5 - block.top) / block.cell_height).astype(int)
        column = np.floor((np.arange(width) + 0.5 - block.left) / block.cell_width).astype(int)
        y, x = np.flatnonzero((row >= 0) & (row < block.rows)), np.flatnonzero((column >= 0) & (column < block.cols))
        pixels[np.ix_(y, x)] = values[np.ix_(row[y], column[x])]
    return pixels


def majority_cells(truth: np.ndarray, counts: np.ndarray, geometry: TokenGeometry, count: int) -> np.ndarray:
    """Return the cells' most frequent true labels (N,), -1 for background: about what a perfect reader of this
    grid can reach (it has the most pixels right; mean IoU can come out a little higher).

    Args:
        truth: (H, W) labels, -1 for background.
        counts: (H, W) bool, pixels that count.
        geometry: where the cells look.
        count: number of labels.
    """
    number = cells_to_pixels(np.arange(len(geometry)), geometry)
    use = (number >= 0) & counts
    table = np.zeros((len(geometry), count + 1))
    np.add.at(table, (number[use], truth[use]), 1)  # label -1 counts in the last column
    best = np.roll(table, 1, axis=1).argmax(1) - 1  # background first: it wins ties
    return best.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Pixels of one picture by label, (C + 1,) each, background last."""

    intersection: np.ndarray
    union: np.ndarray


def overlap(said: np.ndarray, truth: np.ndarray, counts: np.ndarray, count: int) -> Overlap:
    """Compare a map with the truth, pixel by pixel.

    Args:
        said: (H, W) labels, -1 for background.
        truth: (H, W) labels.
        counts: (H, W) bool, pixels that count.
        count: number of labels C.
    """
    said, truth = said[counts] % (count + 1), truth[counts] % (count + 1)
    both = np.bincount(said[said == truth], minlength=count + 1)
    either = np.bincount(said, minlength=count + 1) + np.bincount(truth, minlength=count + 1) - both
    return Overlap(both, either)


def mean_iou(overlaps: Sequence[Overlap], seed: int = 0, resamples: int = 500) -> dict[str, Any]:
    """Mean over labels of intersection over union, each over all pictures.

    Returns:
        ``miou`` (an estimate, labels without background, percentile bootstrap over pictures), ``iou`` (per label, None
        where it neither is nor is said) and ``background`` (an estimate of its own).
    """
    both, either = (np.stack([getattr(item, name) for item in overlaps]) for name in ("intersection", "union"))

    def score(chosen: np.ndarray) -> float:
        top, bottom = both[chosen, :-1].sum(0), either[chosen, :-1].sum(0)
        return float(np.mean(top[bottom > 0] / bottom[bottom > 0])) if (bottom > 0).any() else 0.0

    everyone = np.arange(len(overlaps))
    draws = np.random.default_rng(seed).integers(0, len(everyone), (resamples, len(everyone)))
    low, high = np.percentile([score(chosen) for chosen in draws], [2.5, 97.5])
    total = either.sum(0)
    iou = [float(i / u) if u else None for i, u in zip(both.sum(0)[:-1], total[:-1], strict=True)]
    background = bootstrap_ratio(both[:, -1].astype(float), either[:, -1].astype(float), seed) if total[-1] else None
    return {
        "miou": Estimate(score(everyone), float(low), float(high), len(everyone)),
        "iou": iou,
        "background": background,
    }


def paint(pixels: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """Colour a map of labels (..., H, W) as (..., H, W, 3) uint8 in the schema's fixed palette."""
    colors = [*(label.color for label in schema.labels), BACKGROUND_COLOR]
    table = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors], np.uint8)
    return table[pixels]
