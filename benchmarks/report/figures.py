"""Figures of the report, drawn from records: the headline ratio, first tokens, stages, peers, and growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dualstream.analysis.figure_style import CONTROL as GREY
from dualstream.analysis.figure_style import PALETTE, figure, save

from ..growth import figures as growth_figures
from ..prefill import FULL, LIMIT, OURS
from ..records import Record, Row
from ..stages import STAGES
from .goals import compressed_rows, control_of, limit_of
from .labels import ordered_ways, rate_title, short_title

ENDING = ".png"
MAX_PANELS = 4
COLORS = 64


def draw(record: Record, folder: Path) -> dict[str, list[Path]]:
    """Draw what a record has rows for.

    Args:
        record: of a run.
        folder: where the files go, named after record and suite.

    Returns:
        Paths by suite, in the order they are shown.
    """
    drawers: dict[str, list[Callable[[Record, Path], Path | None]]] = {
        "headline": [headline, first_token],
        "stages": [stages],
        "peers": [peers],
    }
    found: dict[str, list[Path]] = {}
    for suite, functions in drawers.items():
        paths = [function(record, folder) for function in functions]
        found[suite] = [path for path in paths if path is not None]
    curves = growth_figures(record.of("growth"), folder / f"{record.name}-growth")
    found["growth"] = [_few_colors(path) for path in curves]
    return {suite: paths for suite, paths in found.items() if paths}


def headline(record: Record, folder: Path) -> Path | None:
    """Ratio to the natively short prompt by reduction rate: a line per decoder, the goal, and the control in grey."""
    rows = compressed_rows(record)
    batches = _batches(rows)
    if not rows:
        return None
    with figure(1, len(batches), size=(1.2 + 3.4 * len(batches), 3.0)) as (drawn, axes):
        for panel, batch in zip(axes[0], batches, strict=True):
            of_batch = [row for row in rows if row["batch"] == batch]
            controls = {row["reduction"]: control_of(record, row) for row in of_batch}
            _ratio_line(panel, [row for row in controls.values() if row], "the limit twice (control)", GREY, "s", 0)
            names = list(dict.fromkeys(row["decoder"] for row in of_batch))
            for index, name in enumerate(names):
                own = [row for row in of_batch if row["decoder"] == name]
                _ratio_line(panel, own, name, PALETTE[index % len(PALETTE)], "o", 0.4 * (index + 1))
            limit = limit_of(record)
            if limit is not None:
                panel.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"goal, at most {limit:.2f}")
            panel.set_title(f"batch {batch}")
            panel.set_xlabel("visual tokens removed, %")
        axes[0][0].set_ylabel(f"time to first token,\ncompressed / {LIMIT}")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn.suptitle(short_title(record), fontsize=9.5)
        return _small(drawn, folder / f"{record.name}-headline{ENDING}")


def first_token(record: Record, folder: Path) -> Path | None:
    """Milliseconds to the first token of every way at every reduction rate, the whole prompt as a line."""
    rows = record.of("headline")
    batches = _batches(rows)
    if not rows:
        return None
    ways = ordered_ways(record, (row["way"] for row in rows if row["way"] == LIMIT or row["way"].startswith(OURS)))
    with figure(1, len(batches), size=(1.2 + 3.4 * len(batches), 3.0)) as (drawn, axes):
        for panel, batch in zip(axes[0], batches, strict=True):
            of_batch = [row for row in rows if row["batch"] == batch]
            reductions = sorted({row["reduction"] for row in of_batch})
            width = 0.8 / len(ways)
            for index, way in enumerate(ways):
                own = {row["reduction"]: row for row in of_batch if row["way"] == way}
                places = [place + (index - (len(ways) - 1) / 2) * width for place in range(len(reductions))]
                shown = [(place, own[r]) for place, r in zip(places, reductions, strict=True) if r in own]
                color = GREY if way == LIMIT else PALETTE[(index - 1) % len(PALETTE)]
                panel.bar(
                    [place for place, _ in shown],
                    [row["median_ms"] for _, row in shown],
                    width,
                    color=color,
                    label=way,
                    yerr=_quartiles([row for _, row in shown]),
                    ecolor="#333333",
                )
            whole = {row["reduction"]: row for row in of_batch if row["way"] == FULL}
            for place, reduction in enumerate(reductions):
                if reduction in whole:
                    panel.hlines(
                        whole[reduction]["median_ms"],
                        place - 0.45,
                        place + 0.45,
                        color="black",
                        label=FULL if place == 0 else None,
                    )
            panel.set_xticks(range(len(reductions)), [f"{100 * reduction:.0f}" for reduction in reductions])
            panel.set_title(f"batch {batch}")
            panel.set_xlabel("visual tokens removed, %")
            panel.grid(axis="x", visible=False)
        axes[0][0].set_ylabel("time to first token, ms")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn.suptitle(short_title(record), fontsize=9.5)
        return _small(drawn, folder / f"{record.name}-first-token{ENDING}")


def stages(record: Record, folder: Path) -> Path | None:
    """Where the time to the first token goes: a bar per way, a colour per stage."""
    rows = [row for row in record.of("stages") if row["stage"] in STAGES]
    settings = dict.fromkeys((row["batch"], row["reduction"]) for row in rows)
    bars = [(*setting, way) for setting in settings for way in ordered_ways(record, (row["way"] for row in rows))]
    if not rows:
        return None
    with figure(size=(7.0, 1.2 + 0.3 * len(bars))) as (drawn, axes):
        panel, left = axes[0][0], [0.0] * len(bars)
        for stage, color in zip(STAGES, PALETTE, strict=True):
            own = {(row["batch"], row["reduction"], row["way"]): row for row in rows if row["stage"] == stage}
            widths = [own[bar]["median_ms"] if bar in own else 0.0 for bar in bars]
            panel.barh(range(len(bars)), widths, left=left, color=color, label=stage, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        names = [
            f"batch {batch}, {way}" + ("" if way == FULL else f", {rate_title(rate)}") for batch, rate, way in bars
        ]
        panel.set_yticks(range(len(bars)), names)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("milliseconds (medians of stages)")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        panel.set_title(short_title(record))
        return _small(drawn, folder / f"{record.name}-stages{ENDING}")


def peers(record: Record, folder: Path) -> Path | None:
    """Milliseconds to the first token of every method at the same number of kept tokens.

    Of a model that was cut, there is a second panel with what the whole one would take, as calculated.
    """
    rows = record.of("peers")
    if not rows:
        return None
    columns = [name for name in ("median_ms", "full_depth_ms") if any(name in row for row in rows)]
    settings = dict.fromkeys((row["batch"], row["reduction"]) for row in rows)
    panels = [(*setting, column) for setting in settings for column in columns][:MAX_PANELS]
    names = list(dict.fromkeys(row["way"] for row in rows))
    with figure(1, len(panels), size=(2.4 + 2.6 * len(panels), 1.2 + 0.27 * len(names))) as (drawn, axes):
        for panel, (batch, rate, column) in zip(axes[0], panels, strict=True):
            own = {row["way"]: row for row in rows if (row["batch"], row["reduction"]) == (batch, rate)}
            shown = [(place, own[name]) for place, name in enumerate(names) if column in own.get(name, {})]
            measured = column == "median_ms"
            panel.barh(
                [place for place, _ in shown],
                [row[column] for _, row in shown],
                color=[_peer_color(row["way"]) for _, row in shown],
                height=0.7,
                xerr=_quartiles([row for _, row in shown]) if measured else None,
                ecolor="#333333",
                alpha=1.0 if measured else 0.6,
            )
            panel.set_yticks(range(len(names)), names if panel is axes[0][0] else [""] * len(names))
            panel.invert_yaxis()
            panel.grid(axis="y", visible=False)
            panel.set_title(f"batch {batch}, {rate_title(rate)}" + ("" if measured else ",\nall blocks, calculated"))
            panel.set_xlabel("ms to first token")
        drawn.suptitle(short_title(record), fontsize=9.5)
        return _small(drawn, folder / f"{record.name}-peers{ENDING}")


def _small(drawn: Any, path: Path) -> Path:
    """Save a figure with few colours: a third of the bytes, and nothing to see of it."""
    return _few_colors(save(drawn, path))


def _few_colors(path: Path) -> Path:
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return path


def _ratio_line(panel: Any, rows: Sequence[Row], label: str, color: str, marker: str, shift: float) -> None:
    rows = sorted(rows, key=lambda row: row["reduction"])
    if not rows:
        return
    ratios = [row["ratio"] for row in rows]
    below = [row["ratio"] - row["ratio_low"] for row in rows]
    above = [row["ratio_high"] - row["ratio"] for row in rows]
    x = [100 * row["reduction"] + shift for row in rows]  # shifted so that intervals do not hide each other
    panel.errorbar(x, ratios, yerr=[below, above], label=label, color=color, marker=marker, capsize=2)


def _quartiles(rows: Sequence[Row]) -> list[list[float]]:
    below = [row["median_ms"] - row["q1_ms"] for row in rows]
    return [below, [row["q3_ms"] - row["median_ms"] for row in rows]]


def _peer_color(way: str) -> str:
    if way.startswith(OURS):
        return PALETTE[0]
    return GREY if way in (FULL, LIMIT) else PALETTE[1]


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})[:MAX_PANELS]
