"""What the measurements are held against, and the words for it."""

from __future__ import annotations

from typing import Any

from ..headline import CONTROL
from ..prefill import FULL, LIMIT, OURS
from ..records import Record, Row
from .tables import significant

#: Most that a compressed first token may take, as a multiple of the natively short prompt's, by kind of device.
LIMITS = {"cpu": 1.10, "cuda": 1.05}
#: Most of the prefill's time that reading (with the cheap decoder), plan, pooling and rewriting may take together.
JOINING_SHARE = 0.01
CHEAP = "pruned"
#: Most milliseconds of a plan on an accelerator, for pictures of either size, at this batch.
PLAN_MS, PLAN_BATCH = 1.0, 8
STEPS = ("plan", "pool", "rewrite")
BY_ITSELF = "by itself"
MET, MISSED, UNDECIDED = "met", "missed", "undecided"


def verdict(low: float, high: float, limit: float) -> str:
    """Say whether a figure keeps a limit: only an interval that lies on one side of it decides.

    Args:
        low: lower end of the figure's interval.
        high: upper end.
        limit: the figure should be at most this.

    Raises:
        ValueError: the interval is upside down.
    """
    if low > high:
        raise ValueError(f"low={low} must not be above high={high}")
    if high <= limit:
        return MET
    return MISSED if low > limit else UNDECIDED


def limit_of(record: Record) -> float | None:
    """The goal of the headline ratio on a record's device, None where there is none."""
    return LIMITS.get((record.shape or {}).get("device", ""))


def compressed_rows(record: Record) -> list[Row]:
    """Headline rows of compressed prompts that are compared with the limit."""
    return [row for row in record.of("headline") if row["way"].startswith(OURS) and row.get("ratio_to") == LIMIT]


def control_of(record: Record, row: Row) -> Row | None:
    """The row of the same setting where the short prompt is compared with itself."""
    return _same_setting(record, row, CONTROL)


def headline_verdict(record: Record, row: Row) -> str:
    """Word for a headline row; empty where its device has no goal."""
    limit = limit_of(record)
    return "" if limit is None else verdict(row["ratio_low"], row["ratio_high"], limit)


def plan_rows(record: Record) -> list[Row]:
    """Plans that have a goal, with its ``verdict`` by quartiles; none of a run on a CPU."""
    if record.settings.get("device", "cpu") == "cpu":
        return []
    rows = [row for row in record.of("micro") if row["way"].startswith("plan") and row["batch"] == PLAN_BATCH]
    return [{**row, "verdict": verdict(row["q1_ms"], row["q3_ms"], PLAN_MS)} for row in rows]


def reason(record: Record, row: Row) -> str:
    """Say where the time above the limit of a headline row goes, as far as the record knows it."""
    limit = _same_setting(record, row, LIMIT)
    if limit is None:
        return ""
    excess = row["median_ms"] - limit["median_ms"]
    text = f"{significant(excess)} ms more than {significant(limit['median_ms'])} ms"
    control = control_of(record, row)
    if control is not None:
        text += f"; control {control['ratio']:.3f} [{control['ratio_low']:.3f}, {control['ratio_high']:.3f}]"
    steps = _steps(record, row.get("decoder"), row["batch"])
    if steps:
        parts = ", ".join(f"{name} {significant(step['median_ms'])}" for name, step in steps.items())
        text += f"; measured by themselves, in ms: {parts}"
    return text


def joining_shares(record: Record) -> list[dict[str, Any]]:
    """Share of the prefill that reading, plan, pooling and rewriting take together, per decoder and batch.

    Returns:
        Rows with ``decoder``, ``batch``, the medians of the steps, and ``value``, ``low`` and ``high`` of the share:
        the range comes from quartiles, those of the steps against the opposite ones of the prefill. In a model of
        reduced depth, ``full_*`` are the same figures with the prefill of all blocks, which all cost alike.
    """
    shape, found = record.shape or {}, []
    rows = record.of("stages")
    for batch in sorted({row["batch"] for row in rows}):
        of_batch = [row for row in rows if row["batch"] == batch]
        whole = [row for row in of_batch if row["way"] == FULL and row["stage"] == "prefill"]
        readers = [row["stage"] for row in of_batch if row["stage"].startswith("reading, ")]
        for name in dict.fromkeys(readers):
            steps = _steps(record, name.removeprefix("reading, "), batch)
            if not whole or len(steps) < 1 + len(STEPS):
                continue
            sums = {part: sum(step[part] for step in steps.values()) for part in ("median_ms", "q1_ms", "q3_ms")}
            share = {
                "value": sums["median_ms"] / whole[0]["median_ms"],
                "low": sums["q1_ms"] / whole[0]["q3_ms"],
                "high": sums["q3_ms"] / whole[0]["q1_ms"],
            }
            scale = shape.get("layers", 1) / shape.get("full_layers", shape.get("layers", 1))
            found.append(
                {
                    "decoder": name.removeprefix("reading, "),
                    "batch": batch,
                    **{f"{step}_ms": row["median_ms"] for step, row in steps.items()},
                    "prefill_ms": whole[0]["median_ms"],
                    **share,
                    **{f"full_{part}": value * scale for part, value in share.items()},
                }
            )
    return found


def _steps(record: Record, decoder: str | None, batch: int) -> dict[str, Row]:
    """Rows of the steps of compression timed by themselves, by name, at the first reduction that has them."""
    names = {f"reading, {decoder}": "reading", **{step: step for step in STEPS}}
    found: dict[str, Row] = {}
    for row in record.of("stages"):
        if row["way"] == BY_ITSELF and row["batch"] == batch and row["stage"] in names:
            found.setdefault(names[row["stage"]], row)
    return found


def _same_setting(record: Record, row: Row, way: str) -> Row | None:
    for other in record.of("headline"):
        same = all(other.get(name) == row.get(name) for name in ("batch", "images", "reduction", "visual_tokens"))
        if other["way"] == way and same:
            return other
    return None
