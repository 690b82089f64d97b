"""How far two readings of the same cells agree, image by image: cells, run boundaries, meaningless cells, kept share.

Everything is computed from ids and grids alone. Two readings are compared under a key (``text_class``, classes of a
pruned decoder, or none: their ids).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dualstream.modeling.visual_compression import CompressionConfig, run_length_plan

STUDENT_READINGS, TEACHER_READINGS = 5, 2
METHODS = {
    "kept_ratio_difference": "rle",
    "kept_ratio_difference_drop_top1": "rle_drop_top1",
    "kept_ratio_difference_drop_top2": "rle_drop_top2",
}


def reading_agreement(
    student_ids: torch.Tensor,
    teacher_ids: torch.Tensor,
    grids: torch.Tensor,
    *,
    image_index: torch.Tensor | None = None,
    meaningless: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Compare two readings of the same cells, image by image.

    Args:
        student_ids: (N, k) long, best first, blocks one after the other in raster order.
        teacher_ids: (N,) or (N, m) long, best first.
        grids: (n_blocks, 2) long, height and width of every block; sum(h * w) = N.
        image_index: (n_blocks,) long ascending, image of every block; None: every block is an image.
        meaningless: (V,) bool, tokens of no meaning (``token_tables``); without it the figures that need it are left
            out.
        key: (V,) long, what a reading counts as (``text_class``, or classes of a pruned decoder); None: its own id.

    Returns:
        Name -> (n_images,) float64:

        - ``top1``, ``top5``: share of cells whose best (one of whose five best) readings is the teacher's best;
          ``top5`` only if k >= 5.
        - ``boundary_f1``: F1 of the student's run boundaries against the teacher's. A boundary is a place between two
          neighbouring cells of a row where the reading changes. 1 where neither has one.
        - ``meaningless_f1``: F1 of the cells flagged as meaningless. 1 where neither flags any.
        - ``kept_ratio_difference``, ``..._drop_top1``, ``..._drop_top2``: kept share of cells under the plan of
          ``rle``, ``rle_drop_top1``, ``rle_drop_top2`` from the student minus from the teacher; the last only if both
          have two readings.

    Raises:
        ValueError: numbers of cells disagree, an id is outside a table, or an image has no cells.
    """
    teacher_ids = teacher_ids[:, None] if teacher_ids.ndim == 1 else teacher_ids
    student_ids, teacher_ids = student_ids.cpu().long(), teacher_ids.cpu().long()
    grids = torch.as_tensor(grids).cpu().long()
    meaningless = None if meaningless is None else meaningless.cpu()
    key = None if key is None else key.cpu().long()
    image_index = torch.arange(len(grids)) if image_index is None else image_index.cpu().long()
    cells = ImageCells.of(grids, image_index)
    _check_readings(student_ids, teacher_ids, cells, {"meaningless": meaningless, "key": key})

    student, teacher = (ids if key is None else key[ids] for ids in (student_ids, teacher_ids))
    same = student == teacher[:, :1]
    figures = {"top1": cells.mean(same[:, 0])}
    if student.shape[1] >= STUDENT_READINGS:
        figures["top5"] = cells.mean(same[:, :STUDENT_READINGS].any(1))
    figures["boundary_f1"] = cells.f1(cells.boundaries(student[:, 0]), cells.boundaries(teacher[:, 0]))
    if meaningless is not None:
        figures["meaningless_f1"] = cells.f1(meaningless[student_ids[:, 0]], meaningless[teacher_ids[:, 0]])
    figures.update(_kept_ratio_differences(student_ids, teacher_ids, grids, cells, meaningless, key))
    return figures


def _kept_ratio_differences(
    student_ids: torch.Tensor,
    teacher_ids: torch.Tensor,
    grids: torch.Tensor,
    cells: ImageCells,
    meaningless: torch.Tensor | None,
    key: torch.Tensor | None,
) -> dict[str, np.ndarray]:
    """Kept share of cells by the student minus by the teacher, for every plan that both have the readings for."""
    figures = {}
    for name, method in METHODS.items():
        config = CompressionConfig(method, compare="id" if key is None else "text")
        readings = min(student_ids.shape[1], teacher_ids.shape[1])
        if (config.method != "rle" and meaningless is None) or config.top_k > readings:
            continue
        kept = [
            run_length_plan(ids, grids, config, meaningless, key).kept_per_block for ids in (student_ids, teacher_ids)
        ]
        figures[name] = (cells.sum_blocks(kept[0]) - cells.sum_blocks(kept[1])) / cells.per_image
    return figures


@dataclass
class ImageCells:
    """Where every cell lies: its image and its row, counted over the batch; and how many cells an image has."""

    image: torch.Tensor
    row: torch.Tensor
    image_index: torch.Tensor
    per_image: np.ndarray

    @classmethod
    def of(cls, grids: torch.Tensor, image_index: torch.Tensor) -> ImageCells:
        """Lay out the cells of all blocks."""
        if len(image_index) != len(grids) or (image_index.diff() < 0).any():
            raise ValueError(
                f"image_index must be ascending, one entry per block: {len(grids)} blocks, "
                f"image_index {image_index.tolist()}."
            )
        _, image_index = image_index.unique_consecutive(return_inverse=True)
        sizes = grids.prod(-1)
        image = image_index.repeat_interleave(sizes)
        widths = grids[:, 1].repeat_interleave(grids[:, 0])  # of every row
        row = torch.arange(len(widths)).repeat_interleave(widths)
        per_image = torch.bincount(image, minlength=int(image_index.max()) + 1 if len(image_index) else 0)
        if (per_image == 0).any():
            raise ValueError(f"image {int((per_image == 0).nonzero()[0])} has no cells: its grids are empty.")
        return cls(image, row, image_index, per_image.numpy())

    def sum_images(self, values: torch.Tensor) -> np.ndarray:
        """Sum a figure of every cell over each image."""
        return np.bincount(self.image.numpy(), weights=values.double().numpy(), minlength=len(self.per_image))

    def sum_blocks(self, values: torch.Tensor) -> np.ndarray:
        """Sum a figure of every block over each image."""
        return np.bincount(self.image_index.numpy(), weights=values.double().numpy(), minlength=len(self.per_image))

    def mean(self, values: torch.Tensor) -> np.ndarray:
        """Average a figure of every cell over each image."""
        return self.sum_images(values) / self.per_image

    def boundaries(self, reading: torch.Tensor) -> torch.Tensor:
        """(N,) bool: does the reading change from this cell's left neighbour in the same row?"""
        changed = torch.zeros(len(reading), dtype=torch.bool)
        changed[1:] = (reading[1:] != reading[:-1]) & (self.row[1:] == self.row[:-1])
        return changed

    def f1(self, found: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
        """F1 of two sets of cells in every image; 1 where both are empty."""
        both = 2 * self.sum_images(found & wanted)
        total = self.sum_images(found) + self.sum_images(wanted)
        return np.where(total == 0, 1.0, both / np.maximum(total, 1))


def _check_readings(
    student_ids: torch.Tensor, teacher_ids: torch.Tensor, cells: ImageCells, tables: Mapping[str, torch.Tensor | None]
) -> None:
    for name, ids in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
        if ids.ndim != 2 or ids.shape[0] != len(cells.image) or ids.shape[1] < 1:
            raise ValueError(
                f"{name} must have shape (cells, readings), got {tuple(ids.shape)}; the grids have "
                f"{len(cells.image)} cells."
            )
        for table_name, table in tables.items():
            if table is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
                raise ValueError(f"{name} holds ids outside 0..{len(table) - 1}, the entries of {table_name}.")
