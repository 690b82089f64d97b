"""Contrasts of opposite relations and shares of parts, from the rows of ``attention_axes``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

STOCK, SCALED = "stock", "poly:99:8"
AXIS_NAMES = ("h", "w")
FIRST = ("left", "above", "behind")  # relations that count as positive
KEYS = ["pair_id", "axis", "block", "head", "direction"]


def stacked(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A list column as (rows, length) float64."""
    return np.stack(frame[column].to_numpy()).astype(np.float64)


def by_axis(frame: pd.DataFrame, column: str) -> np.ndarray:
    """Mean parts summed over the frequencies of either axis, (rows, 2), height first."""
    parts = stacked(frame, column)
    return parts.reshape(len(parts), 2, -1).sum(-1)


def contrasts(frame: pd.DataFrame, scaling: str) -> pd.DataFrame:
    """Half the difference of opposite relations, per pair, axis of the relation, block, head and direction.

    Returns:
        Columns ``KEYS``, ``odd_h``, ``odd_w``, ``even_h``, ``even_w``.
    """
    rows = frame[frame["scaling"] == scaling]
    sign = np.where(rows["relation"].isin(FIRST), 0.5, -0.5)
    signed = rows[KEYS].copy()
    for part in ("odd", "even"):
        values = by_axis(rows, part) * sign[:, None]
        signed[f"{part}_h"], signed[f"{part}_w"] = values[:, 0], values[:, 1]
    return signed.groupby(KEYS, sort=True).sum().reset_index()


def contrast_shares(frame: pd.DataFrame, scaling: str) -> pd.DataFrame:
    """Per pair and axis of the relation: where the change between opposite relations lies.

    Returns:
        Columns ``pair_id``; ``axis``: share of the relation's own axis in the absolute change of the odd parts of
        both axes; ``parity``: share of the odd part in the absolute change of both parts on the own axis. Sums are
        over blocks, heads and directions.
    """
    table = contrasts(frame, scaling)
    own = np.where(table["axis"] == "horizontal", "w", "h")
    values = {
        "odd_own": _picked(table, "odd", own),
        "odd_other": _picked(table, "odd", np.where(own == "w", "h", "w")),
        "even_own": _picked(table, "even", own),
    }
    sums = table[["pair_id", "axis"]].assign(**values).groupby(["pair_id", "axis"]).sum().reset_index()
    shares = {
        "axis": sums["odd_own"] / (sums["odd_own"] + sums["odd_other"]),
        "parity": sums["odd_own"] / (sums["odd_own"] + sums["even_own"]),
    }
    return pd.DataFrame({"pair_id": sums["pair_id"], **shares})


def odd_shares(frame: pd.DataFrame, scaling: str) -> pd.DataFrame:
    """Per picture: share of the odd part in the size (root mean square) of both, on the relation's axis and the other.

    Returns:
        Columns ``pair_id``, ``expected``, ``other``; index: the picture.
    """
    rows = frame[frame["scaling"] == scaling]
    even, odd = (np.sqrt(stacked(rows, f"{part}_square")) for part in ("even", "odd"))
    sizes = rows[["item", "pair_id", "axis"]].assign(eh=even[:, 0], ew=even[:, 1], oh=odd[:, 0], ow=odd[:, 1])
    sums = sizes.groupby(["item", "pair_id", "axis"]).sum().reset_index().set_index("item")
    width, height = sums["ow"] / (sums["ow"] + sums["ew"]), sums["oh"] / (sums["oh"] + sums["eh"])
    own = sums["axis"] == "horizontal"
    return pd.DataFrame(
        {"pair_id": sums["pair_id"], "expected": width.where(own, height), "other": height.where(own, width)}
    )


def frequency_table(frame: pd.DataFrame, scaling: str) -> np.ndarray:
    """Absolute mean parts on the relation's own axis by frequency, (rows, 2, F): even, odd."""
    rows = frame[frame["scaling"] == scaling]
    own = (rows["axis"] == "horizontal").to_numpy().astype(int)
    parts = []
    for part in ("even", "odd"):
        values = stacked(rows, part).reshape(len(rows), 2, -1)
        parts.append(np.abs(values[np.arange(len(rows)), own]))
    return np.stack(parts, axis=1)


def frequency_shares(frame: pd.DataFrame, scaling: str) -> pd.DataFrame:
    """Per picture: odd share of the upper half of the frequencies of the own axis (``high``) and of the lower."""
    rows = frame[frame["scaling"] == scaling]
    table = frequency_table(frame, scaling)
    half = table.shape[-1] // 2
    sums = rows[["item", "pair_id"]].copy()
    for name, part in (("high", table[..., :half]), ("low", table[..., half:])):
        sums[f"{name}_even"], sums[f"{name}_odd"] = part[:, 0].sum(-1), part[:, 1].sum(-1)
    sums = sums.groupby(["item", "pair_id"]).sum().reset_index().set_index("item")
    shares = {name: sums[f"{name}_odd"] / (sums[f"{name}_odd"] + sums[f"{name}_even"]) for name in ("high", "low")}
    return pd.DataFrame({"pair_id": sums["pair_id"], **shares})


def head_contrasts(frame: pd.DataFrame) -> dict[tuple[Any, ...], tuple[pd.Series, pd.Series]]:
    """Signed odd contrasts of the stock tower by (relations, axis, block, head, direction): values and their pairs."""
    table = contrasts(frame, STOCK)
    found = {}
    for (relations, block, head, direction), rows in table.groupby(["axis", "block", "head", "direction"]):
        for axis in AXIS_NAMES:
            found[relations, axis, int(block), int(head), direction] = (rows[f"odd_{axis}"], rows["pair_id"])
    return found


def _picked(table: pd.DataFrame, part: str, axes: np.ndarray) -> np.ndarray:
    """Absolute contrast of each row on the axis given for it."""
    return np.abs(np.where(axes == "w", table[f"{part}_w"], table[f"{part}_h"]))
