"""Cut one image out of a reading, with its part of the compression plan."""

from __future__ import annotations

from typing import Any

import numpy as np

Grids = tuple[tuple[int, int], ...]


def cells_of_image(reading: Any, image_number: int) -> tuple[slice, Grids]:
    """Cells and grids of one image of a reading.

    Args:
        reading: object with `grids` (blocks, 2) and perhaps `image_index` (blocks,), the image of every block.
        image_number: which image.

    Returns:
        The image's cells within the reading, and (rows, cols) of its blocks.

    Raises:
        ValueError: if the reading holds no such image.
    """
    grids = np.asarray(_on_cpu(reading.grids), dtype=np.int64).reshape(-1, 2)
    owner = getattr(reading, "image_index", None)
    owner = np.zeros(len(grids), dtype=np.int64) if owner is None else np.asarray(_on_cpu(owner))
    blocks = np.flatnonzero(owner == image_number)
    if not len(blocks):
        raise ValueError(f"image_number must be one of {np.unique(owner).tolist()}, got {image_number}.")
    ends = np.cumsum(grids.prod(axis=1))
    start = int(ends[blocks[0]] - grids[blocks[0]].prod())
    return slice(start, int(ends[blocks[-1]])), tuple((int(rows), int(cols)) for rows, cols in grids[blocks])


def plan_of_image(
    compression: Any, ids: np.ndarray, grids: Grids, tokenizer: Any, cells: slice, total: int
) -> tuple[np.ndarray | None, np.ndarray | None, dict[str, Any] | None]:
    """Runs and anchors of one image.

    Args:
        compression: a plan of the whole reading or of this image, a report that holds one, options, or None.
        ids: (N, k) readings of the image.
        grids: its blocks.
        tokenizer: for the tables that some methods need.
        cells: where the image's cells lie within the reading.
        total: cells of the whole reading.

    Returns:
        run (N,) int64, anchor (M,) int64 and the options as a dict; each None where unknown or off.

    Raises:
        ValueError: if a plan covers another number of cells, or the options are unknown.
    """
    if compression is None:
        return None, None, None
    if hasattr(compression, "anchor"):
        plan, options = compression, None
    elif hasattr(compression, "plan"):
        plan, options = compression.plan, compression.config.to_dict()
    else:
        plan, options = _new_plan(compression, ids, grids, tokenizer)
    if options is not None and options["method"] == "none":
        return None, None, None
    run, anchor = np.asarray(_on_cpu(plan.run)), np.asarray(_on_cpu(plan.anchor))
    if len(run) == total != len(ids):
        run = run[cells]
        anchor = anchor[(anchor >= cells.start) & (anchor < cells.stop)] - cells.start
    if len(run) != len(ids):
        raise ValueError(f"the compression plan covers {len(run)} cells, the image has {len(ids)}.")
    return run - run[0] if len(run) else run, anchor, options


def _new_plan(compression: Any, ids: np.ndarray, grids: Grids, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Compute the plan that a model would use for these readings."""
    import torch

    from dualstream.modeling import CompressionConfig, run_length_plan, token_tables

    config = CompressionConfig.from_any(compression)
    tables: tuple[Any, Any] = (None, None)
    if config.needs_token_tables:
        tables = token_tables(tokenizer, int(max(ids.max(initial=0) + 1, len(tokenizer))))
    plan = run_length_plan(torch.from_numpy(ids), torch.tensor(grids), config, *tables)
    return plan, config.to_dict()


def _on_cpu(values: Any) -> Any:
    """Values on the CPU where they are a tensor."""
    return values.detach().cpu() if hasattr(values, "detach") else values
