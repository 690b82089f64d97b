"""How cost grows with one variable at a time: measured curves, fitted, and held against the closed form.

Every way of every point of a curve is timed in turns (``measuring.interleaved``). A curve is then fitted in the form
that the work has: linear in batch, depth and classes, with a square in tokens. The same fit to the FLOPs of
``closed_form`` at the same points says what part the square should have; where time and FLOPs disagree, the row says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dualstream.measuring import MILLISECONDS, Clock, against, interleaved, timing

from ..closed_form import prefill_flops
from ..prefill import FULL, LIMIT, OURS
from ..shapes import build_config
from ..workload import make_inputs
from .curves import figures
from .fits import PARTS, Fit, fit, polynomial
from .points import POINTS, READING, Growth, Point, Row

__all__ = ["figures", "run"]

SUITE = "growth"
CURVES = tuple(POINTS)
DEGREES = {"image size": 2, "batch": 1, "images": 2, "reduction": 2, "vocabulary": 1, "answer length": 2, "depth": 1}
UNITS = {
    "image size": "visual tokens of a picture",
    "batch": "rows",
    "images": "visual tokens of a row",
    "reduction": "visual tokens kept",
    "vocabulary": "tokens of the vocabulary",
    "answer length": "tokens of the answer",
    "depth": "blocks of the language model",
}
AGREES = 0.1  # of the growth that FLOPs predict, beyond the interval of what was measured
WIDE = 1.5  # an interval whose ends are further apart says nothing
REASON_LESS = "time grows less: part of it (dispatch, reading weights, the half that causal attention skips) is fixed"
REASON_MORE = "time grows more: work that is no matrix product, or moves bytes, grows too"
REASONS = {"answer length": "a step of one token reads all weights, so that bytes and not FLOPs set its time"}


def run(
    model: Any,
    shape: str,
    image_size: tuple[int, int],
    reduction: float = 0.49,
    decoder: str = "pruned",
    rounds: int = 7,
    clock: Clock | None = None,
    text_tokens: int = 48,
    curves: Sequence[str] = CURVES,
    quick: bool = False,
    progress: Callable[[], Any] | None = None,
) -> list[Row]:
    """Measure curves over one variable at a time, and fit them.

    Args:
        model: a stock model, of reduced depth or not.
        shape: its name in ``shapes.SHAPES``.
        image_size: height and width in pixels.
        reduction: share of visual tokens that compression removes.
        decoder: kind that reads, see ``forced_map.build_decoder``.
        rounds: of every curve.
        clock: of the device.
        text_tokens: of a row.
        curves: see ``CURVES``.
        quick: fewer and smaller points.
        progress: called after every timed run.

    Returns:
        Rows of kind ``point``, ``fit``, ``share at full depth`` and ``note``.

    Raises:
        ValueError: a curve is unknown.
    """
    unknown = sorted(set(curves) - set(CURVES))
    if unknown:
        raise ValueError(f"curves {', '.join(unknown)} are unknown; choose from {', '.join(CURVES)}")
    growth = Growth(model, shape, image_size, text_tokens, reduction, decoder, quick)
    rows: list[Row] = []
    for curve in curves:
        points = POINTS[curve](growth)
        if len(points) <= DEGREES[curve]:
            note = f"{len(points)} possible value(s) of {UNITS[curve]}: nothing to measure"
            rows.append({"suite": SUITE, "kind": "note", "curve": curve, "note": note})
            continue
        seconds = _measured(points, rounds, clock or Clock(model.device), progress)
        fits = {way: fit(_xs(points, way), values, DEGREES[curve]) for way, values in _tables(points, seconds).items()}
        rows += _point_rows(curve, points, seconds)
        rows += [_fit_row(curve, way, found, points) for way, found in fits.items()]
        if curve == "depth":
            rows.append(_full_depth_row(growth, points, seconds, fits))
    return rows


def _measured(
    points: Sequence[Point], rounds: int, clock: Clock, progress: Callable[[], Any] | None
) -> dict[tuple[float, str], np.ndarray]:
    """Seconds (rounds,) of every point and way, all in turns."""
    keys = {f"{point.x}|{name}": (point.x, name) for point in points for name in point.ways}
    ways = {f"{point.x}|{name}": way for point in points for name, way in point.ways.items()}
    seconds = interleaved(ways, rounds, clock=clock, progress=progress)
    return {keys[name]: values for name, values in seconds.items()}


def _xs(points: Sequence[Point], way: str) -> list[float]:
    return [point.x for point in points if way in point.ways]


def _tables(points: Sequence[Point], seconds: dict[tuple[float, str], np.ndarray]) -> dict[str, np.ndarray]:
    """Seconds (rounds, points) of every way that has a whole curve."""
    names = points[0].ways
    return {name: np.stack([seconds[point.x, name] for point in points], axis=1) for name in names}


def _point_rows(curve: str, points: Sequence[Point], seconds: dict[tuple[float, str], np.ndarray]) -> list[Row]:
    rows = []
    for point in points:
        for name in point.ways:
            values = seconds[point.x, name]
            row = {"suite": SUITE, "kind": "point", "curve": curve, "unit": UNITS[curve], "x": point.x, "way": name}
            row |= {key: value for key, value in point.facts.items() if key != "kv_bytes"}
            row |= {"kv_bytes": point.facts.get("kv_bytes", {}).get(name)}
            row |= {"gflops": point.flops[name] / 1e9, **timing(values)}
            if name == OURS:
                other = LIMIT if LIMIT in point.ways else FULL
                row |= against(values, seconds[point.x, other], other)
            rows.append(row)
    return rows


def _fit_row(curve: str, way: str, found: Fit, points: Sequence[Point]) -> Row:
    """Coefficients in milliseconds, the part of the highest term, and what FLOPs say about it."""
    degree, x = DEGREES[curve], np.array(_xs(points, way))
    work = np.array([point.flops[way] for point in points], dtype=float)
    predicted = fit(list(x), np.stack([work, work]), degree)
    top, last = PARTS[degree], x[-1]
    shares = [item.parts[degree] * last**degree / item.at(last) for item in (found, predicted)]
    drawn = found.resamples[:, degree] * last**degree
    whole = (found.resamples * last ** np.arange(degree + 1)).sum(1)
    low, high = np.percentile(drawn / whole, [2.5, 97.5])
    growth, expected = float(found.at(last) / found.at(x[0])), float(work[-1] / work[0])
    drawn_growth = whole / (found.resamples * x[0] ** np.arange(degree + 1)).sum(1)
    least, most = (float(end) for end in np.percentile(drawn_growth, [2.5, 97.5]))
    row: Row = {"suite": SUITE, "kind": "fit", "curve": curve, "unit": UNITS[curve], "way": way, "points": len(x)}
    for index, name in enumerate(PARTS[: degree + 1]):
        row |= {f"{name}_ms": float(found.parts[index] * MILLISECONDS)}
        row |= {f"{name}_ms_{end}": float(getattr(found, end)[index] * MILLISECONDS) for end in ("low", "high")}
    row |= {
        "x_first": float(x[0]),
        "x_last": float(last),
        "r_squared": found.r_squared,
        "worst_residual": found.worst_residual,
        "top_term": top,
        "top_share": float(shares[0]),
        "top_share_low": float(low),
        "top_share_high": float(high),
        "flops_top_share": float(shares[1]),
        "growth": growth,
        "growth_low": least,
        "growth_high": most,
        "flops_growth": expected,
        "agrees": _agreement(least, most, expected),
    }
    return {**row, "explanation": _explanation(row)}


def _agreement(least: float, most: float, expected: float) -> bool | None:
    """Whether an interval of growth holds what was expected; None if it is too wide to tell."""
    if most > least * WIDE:
        return None
    return bool(least <= expected * (1 + AGREES) and most >= expected * (1 - AGREES))


def _explanation(row: Row) -> str:
    """Say in a sentence what was measured, what was predicted, and why they differ if they do."""
    growth, expected = row["growth"], row["flops_growth"]
    facts = (
        f"From {row['x_first']:g} to {row['x_last']:g} {row['unit']}, time grows {growth:.2f} times "
        f"({row['growth_low']:.2f} to {row['growth_high']:.2f}) and FLOPs {expected:.2f} times; the {row['top_term']} "
        f"term is {row['top_share']:.0%} of the time ({row['top_share_low']:.0%} to {row['top_share_high']:.0%}) and "
        f"{row['flops_top_share']:.0%} of the FLOPs"
    )
    if row["agrees"] is None:
        return facts + ": the rounds differ too much to tell."
    if row["agrees"]:
        return facts + ": growth agrees."
    return f"{facts}: {REASONS.get(row['curve'], REASON_LESS if growth < expected else REASON_MORE)}."


def _full_depth_row(
    growth: Growth, points: Sequence[Point], seconds: dict[tuple[float, str], np.ndarray], fits: dict[str, Fit]
) -> Row:
    """Share of reading in the time to the first token at full depth, extrapolated along the fitted line.

    The tower is as deep as the model's, not as the shape's: with a cut tower the share is overestimated.
    """
    full = build_config(growth.shape).get_text_config().num_hidden_layers
    reading, line = seconds[points[-1].x, READING], fits[FULL]
    rng = np.random.default_rng(0)
    drawn = np.median(reading[rng.integers(0, len(reading), (len(line.resamples), len(reading)))], axis=1)
    shares = drawn / np.array([polynomial(parts, full) for parts in line.resamples])
    low, high = np.percentile(shares, [2.5, 97.5])
    deepest = points[-1]
    return {
        "suite": SUITE,
        "kind": "share at full depth",
        "curve": "depth",
        "decoder": growth.decoder,
        "layers": int(deepest.x),
        "full_layers": full,
        "reading_ms": float(np.median(reading) * MILLISECONDS),
        "first_token_ms": float(line.at(full) * MILLISECONDS),
        "reading_share": float(np.median(reading) / line.at(full)),
        "reading_share_low": float(low),
        "reading_share_high": float(high),
        "flops_reading_share": deepest.flops[READING] / _full_flops(growth, full),
        "explanation": "reading / time of the uncompressed first token on the fitted line at full depth of the "
        "language model; a tower that was cut makes the share larger than it is",
    }


def _full_flops(growth: Growth, layers: int) -> float:
    """FLOPs of the whole prompt with a language model of full depth and the tower that the model has."""
    length = make_inputs(growth.model, growth.image_size, text_tokens=growth.text_tokens)["input_ids"].shape[1]
    return (growth.seeing(growth.image_size) + prefill_flops(build_config(growth.shape, layers), length)).total
