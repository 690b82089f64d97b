"""States of rolled pictures place by place, and a linear reader of places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .position_measures import ALPHAS, shuffled

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ..bench import Bench
    from ..items import WhereItem
    from ..states import Place


def rolled(image: Image, rng: np.random.Generator) -> Image:
    """The picture rolled around its borders by a random number of pixels each way."""
    from PIL.Image import fromarray

    pixels = np.asarray(image)
    shift = (int(rng.integers(pixels.shape[0])), int(rng.integers(pixels.shape[1])))
    return fromarray(np.roll(pixels, shift, axis=(0, 1)))


def dominant_grid(bench: Bench, items: Sequence[WhereItem]) -> tuple[int, int]:
    """The (rows, cols) that most feature blocks of the pictures have."""
    counted = Counter(grid for item in items for grid in bench.geometry(bench.size(item)).grids)
    return counted.most_common(1)[0][0]


def blocks_of_grid(
    grids: Sequence[tuple[int, int]], grid: tuple[int, int], states: Mapping[Place, torch.Tensor]
) -> Iterator[dict[Place, np.ndarray]]:
    """Per block that has the grid: place -> (rows, cols, d) float32."""
    start = 0
    for rows, cols in grids:
        if (rows, cols) == grid:
            block = slice(start, start + rows * cols)
            yield {place: each[block].numpy().reshape(rows, cols, -1) for place, each in states.items()}
        start += rows * cols


class CellReader:
    """Reads row and column off a state by ridge regression, and knows the mean state of every place.

    Args:
        grid: (rows, cols).
        seed: of the choice of training cells and of the shuffled control.
    """

    def __init__(self, grid: tuple[int, int], seed: int) -> None:
        self.grid = grid
        self._rng = np.random.default_rng(seed)
        self._total: Any = 0.0
        self._count = 0
        self._cells: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._wrong: list[np.ndarray] = []
        row, col = np.mgrid[: grid[0], : grid[1]]
        scale = np.maximum(np.array(grid) - 1, 1)
        self.targets = np.stack([row, col], -1) / scale  # (rows, cols, 2) in 0..1

    def add(self, cells: np.ndarray, most: int) -> None:
        """Take the states (rows, cols, d) of a training picture; `most` of its cells train the linear reader."""
        self._total = self._total + cells.astype(np.float64)
        self._count += 1
        chosen = self._rng.permutation(cells.shape[0] * cells.shape[1])[:most]
        self._cells.append(cells.reshape(-1, cells.shape[-1])[chosen])
        self._targets.append(self.targets.reshape(-1, 2)[chosen])
        self._wrong.append(shuffled(self.targets, self._rng).reshape(-1, 2)[chosen])

    def fit(self) -> None:
        """Fit the reader, and one for the control, whose places were shuffled within every picture."""
        from sklearn.linear_model import RidgeCV

        self.field = self._total / self._count
        cells = np.concatenate(self._cells)
        self._centre, self._scale = cells.mean(0), np.maximum(cells.std(0), 1e-6)
        standard = (cells - self._centre) / self._scale
        self._reader = RidgeCV(ALPHAS).fit(standard, np.concatenate(self._targets))
        self._control = RidgeCV(ALPHAS).fit(standard, np.concatenate(self._wrong))
        self._mean = self.field.mean((0, 1))
        self._shuffled = shuffled(self.field, self._rng)
        self._cells = []

    def measure(self, cells: np.ndarray) -> dict[str, float]:
        """R² of row and column in one more picture, the share of its variance that is place, and all for the control.

        Args:
            cells: (rows, cols, d) states.
        """
        standard = (cells.reshape(-1, cells.shape[-1]) - self._centre) / self._scale
        found = {}
        for suffix, reader, field in (("", self._reader, self.field), (" null", self._control, self._shuffled)):
            error = ((reader.predict(standard).reshape(self.targets.shape) - self.targets) ** 2).sum((0, 1))
            spread = ((self.targets - self.targets.mean((0, 1))) ** 2).sum((0, 1))
            for name, value in zip(("row", "col"), 1 - error / np.maximum(spread, 1e-12), strict=True):
                found[f"{name}{suffix}"] = float(value)
            rest = ((cells - field) ** 2).sum() / ((cells - self._mean) ** 2).sum()
            found[f"share{suffix}"] = float(1 - rest)
        return found
