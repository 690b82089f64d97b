"""Where every visual token looks: visual token <-> rectangle of the original image, exactly.

Whatever a processor does to a picture (resize, pad, centre-crop, cut into tiles) is a shift and a scale per axis, so
the tokens of each *block* of features lie on a regular grid of rectangles of the original image. A block is the
whole picture for LLaVA and the Qwen family, one tile or the thumbnail for InternVL. `geometry.token_geometry`
reads those numbers from a real processor; everything that speaks of "the tokens of an object" goes through here.

Pixel (i, j) of an image covers the unit square [j, j + 1) x [i, i + 1); all coordinates are in such pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

SLIVER = 1e-6  # square pixels: what rounding leaves of a token beside the image, too little to divide by


@dataclass(frozen=True)
class Block:
    """A regular grid of visual tokens on the original image.

    Attributes:
        rows: token rows.
        cols: token columns.
        left: x of the grid's left edge in original pixels; negative where the processor padded.
        top: y of the grid's top edge.
        cell_width: width of one token's rectangle in original pixels.
        cell_height: height of one token's rectangle.
        thumbnail: whether the block shows the whole picture again, small, beside its tiles.
    """

    rows: int
    cols: int
    left: float
    top: float
    cell_width: float
    cell_height: float
    thumbnail: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.cell_width <= 0 or self.cell_height <= 0:
            raise ValueError(f"a block needs at least one cell of positive size, got {self}.")

    @property
    def corners(self) -> np.ndarray:
        """(rows * cols, 4) float64 rectangles x1, y1, x2, y2, raster order, not clipped to the image."""
        x = self.left + self.cell_width * np.arange(self.cols + 1)
        y = self.top + self.cell_height * np.arange(self.rows + 1)
        row, col = np.divmod(np.arange(self.rows * self.cols), self.cols)
        return np.stack([x[col], y[row], x[col + 1], y[row + 1]], axis=1)


@dataclass(frozen=True)
class TokenGeometry:
    """The rectangles of all visual tokens of one image, in the order of the model's image features.

    Attributes:
        image_size: (width, height) of the original image in pixels.
        blocks: the feature blocks in sequence order; tokens are in raster order inside each block.
    """

    image_size: tuple[int, int]
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        """Number N of visual tokens."""
        return sum(block.rows * block.cols for block in self.blocks)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, cols) of every block."""
        return [(block.rows, block.cols) for block in self.blocks]

    @cached_property
    def places(self) -> np.ndarray:
        """(N, 3) int64: block, row and column of every token."""
        parts = []
        for number, (rows, cols) in enumerate(self.grids):
            row, col = np.divmod(np.arange(rows * cols), cols)
            parts.append(np.stack([np.full_like(row, number), row, col], axis=1))
        return np.concatenate(parts)

    @cached_property
    def is_thumbnail(self) -> np.ndarray:
        """(N,) bool: tokens of a block that repeats the whole picture."""
        return np.array([block.thumbnail for block in self.blocks])[self.places[:, 0]]

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float64 rectangles x1, y1, x2, y2 in original pixels, clipped to the image.

        A token that sees only padding has a rectangle without area.
        """
        width, height = self.image_size
        corners = np.concatenate([block.corners for block in self.blocks])
        return np.clip(corners, 0, np.array([width, height, width, height], dtype=float))

    @cached_property
    def areas(self) -> np.ndarray:
        """(N,) float64 area of every rectangle in `boxes`, in square pixels; slivers below `SLIVER` count as none."""
        areas = (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])
        return np.where(areas < SLIVER, 0.0, areas)

    @property
    def polygons(self) -> np.ndarray:
        """(N, 4, 2) float64 corners of every rectangle, clockwise from the top left, for drawing."""
        return self.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)

    def coverage_of_box(self, box: Sequence[float]) -> np.ndarray:
        """Share of every token's rectangle that lies inside a box.

        Args:
            box: x1, y1, x2, y2 in original pixels, x1 <= x2 and y1 <= y2.

        Returns:
            (N,) float64 in 0..1; 0 for tokens without area.

        Raises:
            ValueError: if `box` is not four ordered numbers.
        """
        corners = np.asarray(box, dtype=float)
        if corners.shape != (4,) or not (corners[0] <= corners[2] and corners[1] <= corners[3]):
            raise ValueError(f"box must be x1 <= x2, y1 <= y2 as (x1, y1, x2, y2), got {box}.")
        low, high = np.maximum(self.boxes[:, :2], corners[:2]), np.minimum(self.boxes[:, 2:], corners[2:])
        return self._share(np.prod(np.clip(high - low, 0, None), axis=1))

    def coverage_of_mask(self, mask: np.ndarray) -> np.ndarray:
        """Share of every token's rectangle that a mask covers, partly covered pixels counted by area.

        Args:
            mask: (height, width) bool, or weights 0..1, over the original image.

        Returns:
            (N,) float64 in 0..1; 0 for tokens without area.

        Raises:
            ValueError: if the mask's shape is not the image's.
        """
        width, height = self.image_size
        mask = np.asarray(mask)
        if mask.shape != (height, width):
            raise ValueError(f"mask must have the image's (height, width) = {(height, width)}, got {mask.shape}.")
        table = np.zeros((height + 1, width + 1))
        np.cumsum(np.cumsum(mask, axis=0, dtype=float), axis=1, out=table[1:, 1:])
        x1, y1, x2, y2 = self.boxes.T
        covered = _integral(table, x2, y2) - _integral(table, x1, y2) - _integral(table, x2, y1)
        covered = np.clip(covered + _integral(table, x1, y1), 0, self.areas)
        rounding = 16 * np.finfo(float).eps * table[-1, -1]  # what the sums leave at tokens that nothing covers
        return self._share(np.where(covered <= rounding, 0.0, covered))

    def tokens_of_box(self, box: Sequence[float], min_coverage: float = 0.0, thumbnail: bool = True) -> np.ndarray:
        """Indices of the tokens that lie in a box.

        Args:
            box: x1, y1, x2, y2 in original pixels.
            min_coverage: share of a token's rectangle that must lie inside; at 0 any overlap of positive area counts.
            thumbnail: whether to list tokens of a thumbnail too.

        Returns:
            (n,) int64 token indices, ascending.
        """
        return self._chosen(self.coverage_of_box(box), min_coverage, thumbnail)

    def tokens_of_mask(self, mask: np.ndarray, min_coverage: float = 0.0, thumbnail: bool = True) -> np.ndarray:
        """Indices of the tokens that a mask covers; see `tokens_of_box` and `coverage_of_mask`."""
        return self._chosen(self.coverage_of_mask(mask), min_coverage, thumbnail)

    def token_at(self, x: float, y: float, thumbnail: bool = False) -> int | None:
        """Index of the token that looks at a point of the original image.

        Args:
            x: distance from the left edge in pixels.
            y: distance from the top edge in pixels.
            thumbnail: ask the thumbnail instead of the tiles.

        Returns:
            The token's index, or None where no token looks (outside the image, or cropped away).
        """
        width, height = self.image_size
        if not (0 <= x < width and 0 <= y < height):
            return None
        start = 0
        for block in self.blocks:
            row = int(np.floor((y - block.top) / block.cell_height))
            col = int(np.floor((x - block.left) / block.cell_width))
            if block.thumbnail == thumbnail and 0 <= row < block.rows and 0 <= col < block.cols:
                return start + row * block.cols + col
            start += block.rows * block.cols
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back."""
        return {"image_size": list(self.image_size), "blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenGeometry:
        """Rebuild a geometry from `to_dict`'s values."""
        width, height = values["image_size"]
        return cls((int(width), int(height)), tuple(Block(**block) for block in values["blocks"]))

    def _share(self, covered: np.ndarray) -> np.ndarray:
        """Divide covered areas by the tokens' areas, 0 where a token has none."""
        return np.divide(covered, self.areas, out=np.zeros(len(self)), where=self.areas > 0)

    def _chosen(self, coverage: np.ndarray, min_coverage: float, thumbnail: bool) -> np.ndarray:
        """Indices whose coverage is positive and at least `min_coverage`."""
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"min_coverage must lie in 0..1, got {min_coverage}.")
        chosen = (coverage > 0) & (coverage >= min_coverage)
        return np.flatnonzero(chosen if thumbnail else chosen & ~self.is_thumbnail)


def _integral(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integral of a mask over [0, x] x [0, y], from its summed-area table (height + 1, width + 1).

    A mask is constant on each pixel, so its integral is bilinear between pixel corners and interpolation is exact.
    """
    row = np.clip(np.floor(y).astype(int), 0, table.shape[0] - 2)
    col = np.clip(np.floor(x).astype(int), 0, table.shape[1] - 2)
    down, right = y - row, x - col
    upper = table[row, col] * (1 - right) + table[row, col + 1] * right
    lower = table[row + 1, col] * (1 - right) + table[row + 1, col + 1] * right
    return upper * (1 - down) + lower * down
