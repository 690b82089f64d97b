"""Names of records, ways and rates as they stand in tables and figures."""

from __future__ import annotations

from collections.abc import Iterable

from ..prefill import FULL, LIMIT, OURS
from ..records import Record
from ..shapes import SHAPES


def short_title(record: Record) -> str:
    """What was measured, in a line: model, its depth where it was cut, picture where it is not the usual one."""
    shape = record.shape
    if shape is None:
        return record.name
    parts = [shape["name"] + (" (toy widths)" if shape["is_toy"] else "")]
    for part, name in (("blocks", "layers"), ("tower blocks", "vision_layers")):
        if shape[name] < shape[f"full_{name}"]:
            parts.append(f"{shape[name]} of {shape[f'full_{name}']} {part}")
    usual = SHAPES.get(shape["name"])
    if usual is None or list(usual.image_size) != shape["image_size"]:
        parts.append("{}x{} pixels".format(*shape["image_size"]))
    images = record.settings.get("images", 1)
    if images > 1:
        parts.append(f"{images} pictures")
    return ", ".join([*parts, shape["dtype"], shape["device"]])


def ordered_ways(record: Record, ways: Iterable[str]) -> list[str]:
    """Sort ways: the whole prompt, the limit, ours with decoders in the order of the run, then all others."""
    ours = [f"{OURS}, {decoder}" for decoder in record.settings.get("decoders", ())]
    known = [FULL, LIMIT, *ours]
    return sorted(set(ways), key=lambda way: (known.index(way) if way in known else len(known), way))


def rate_title(rate: float) -> str:
    """Name of a column of a reduction rate."""
    return f"{100 * rate:.3g} % fewer"
