"""In which order a vision tower holds its patches, for work on features before the merger.

The Qwen processors do not hand patches over row by row: the merge x merge patches that will become one visual token
stand next to each other ("merge-block order"). Qwen2.5-VL then permutes those groups window by window inside its
tower and undoes it after the merger, so visual tokens themselves are always in raster order. CLIP and InternViT hold
patches in raster order behind one class token, and need none of this.

Every function returns an *order*: `order[place]` is the raster index (row * cols + col) of the patch that stands at
`place` in the sequence. Indexing a sequence with `inverse(order)` puts it into raster order.
"""

from __future__ import annotations

import numpy as np


def merge_block_order(rows: int, cols: int, merge: int = 2) -> np.ndarray:
    """Order of the patches of one image as the Qwen2-VL, Qwen2.5-VL and Qwen3-VL processors emit them.

    The patch at (row r, column c) stands at ((r // m) * (cols // m) + c // m) * m² + (r % m) * m + c % m.

    Args:
        rows: patch rows of the image (`image_grid_thw[i, 1]`), a multiple of `merge`.
        cols: patch columns (`image_grid_thw[i, 2]`), a multiple of `merge`.
        merge: patches per side of one visual token.

    Returns:
        (rows * cols,) int64, raster index of the patch at each place.

    Raises:
        ValueError: if rows or cols is no positive multiple of `merge`.
    """
    _check_grid(rows, cols, merge)
    raster = np.arange(rows * cols).reshape(rows // merge, merge, cols // merge, merge)
    return raster.transpose(0, 2, 1, 3).reshape(-1)


def window_order(rows: int, cols: int, merge: int = 2, window: int = 8) -> np.ndarray:
    """Order of the patches of one image inside the Qwen2.5-VL tower, where attention is computed per window.

    Args:
        rows: patch rows of the image, a multiple of `merge`.
        cols: patch columns, a multiple of `merge`.
        merge: patches per side of one visual token.
        window: patches per side of one attention window: `vision_config.window_size // vision_config.patch_size`.

    Returns:
        (rows * cols,) int64, raster index of the patch at each place.

    Raises:
        ValueError: if rows or cols is no positive multiple of `merge`, or a window holds no whole token.
    """
    groups = merge_block_order(rows, cols, merge).reshape(-1, merge * merge)
    return groups[window_token_order(rows // merge, cols // merge, window // merge)].reshape(-1)


def window_token_order(rows: int, cols: int, window: int = 4) -> np.ndarray:
    """Order of the merge groups of one image inside the Qwen2.5-VL tower (its `window_index`).

    Args:
        rows: token rows of the image (patch rows // merge).
        cols: token columns.
        window: tokens per side of one attention window.

    Returns:
        (rows * cols,) int64, raster index of the token whose patches stand at each place.

    Raises:
        ValueError: if `window` is less than 1.
    """
    if window < 1:
        raise ValueError(f"window must hold at least one visual token per side, got {window}.")
    row, col = np.divmod(np.arange(rows * cols), cols)
    return np.lexsort((col, row, col // window, row // window))  # the last key counts most


def inverse(order: np.ndarray) -> np.ndarray:
    """Return the place of every raster index, so that indexing with it undoes `order`."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


def places_of_tokens(tokens: np.ndarray, rows: int, cols: int, merge: int, order: np.ndarray) -> np.ndarray:
    """Places in the patch sequence of the merge x merge patches behind each visual token.

    Args:
        tokens: (n,) raster indices of visual tokens on the (rows // merge) x (cols // merge) grid.
        rows: patch rows of the image.
        cols: patch columns.
        merge: patches per side of one visual token.
        order: order of the patch sequence, from `merge_block_order` or `window_order`.

    Returns:
        (n, merge * merge) int64 indices into the patch sequence.
    """
    _check_grid(rows, cols, merge)
    row, col = np.divmod(np.asarray(tokens), cols // merge)
    offsets = np.arange(merge)
    patch_rows = row[:, None, None] * merge + offsets[None, :, None]
    patch_cols = col[:, None, None] * merge + offsets[None, None, :]
    return inverse(order)[patch_rows * cols + patch_cols].reshape(len(row), -1)


def _check_grid(rows: int, cols: int, merge: int) -> None:
    """Raise ValueError unless the patch grid divides into merge x merge groups."""
    if merge < 1 or rows < 1 or cols < 1 or rows % merge or cols % merge:
        raise ValueError(f"a {rows}x{cols} patch grid does not divide into {merge}x{merge} groups.")
