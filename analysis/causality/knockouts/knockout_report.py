"""Tables, report and figures of a knockout run, all from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ablations.ablate_report import nats, p_text
from ..experiment import write_report
from ..outcome_table import add_holm, against_baseline, baseline_of, paired_destruction
from ..tables import markdown_table, percent
from .routes import CONTROLS, PAPER_ROUTES

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def summarize(table: pa.Table, seed: int = 0) -> dict[str, Any]:
    """All figures of a run.

    Returns:
        ``settings``: per setting ``baseline``, ``cells`` (one per route, window and head; head -1: all together, with
        Holm's correction over all of these) and ``comparisons`` with matched controls.
    """
    frame = table.to_pandas()
    frame["draw"] = 0
    return {"settings": {str(name): _setting(rows, seed) for name, rows in frame.groupby("setting", sort=False)}}


def _setting(rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    base, baseline = baseline_of(rows[rows["route"] == "none"])
    cells, by_cell = [], {}
    for key, own in rows[rows["route"] != "none"].groupby(["route", "window", "head"], sort=False):
        route, window, head = str(key[0]), str(key[1]), int(key[2])
        by_cell[route, window, head] = own
        cells.append(
            {
                "route": route,
                "window": window,
                "layers": [int(layer) for layer in own["layers"].iloc[0]],
                "head": head,
                "sources": float(own["n_sources"].mean()),
                "destinations": float(own["n_destinations"].mean()),
                **against_baseline(own, base, seed),
            }
        )
    add_holm(cells, "test", "p_value")
    comparisons = []
    for (route, window, head), own in by_cell.items():
        control = by_cell.get((CONTROLS.get(route, ""), window, head))
        if control is not None and head < 0:
            found = paired_destruction(own, control, base, seed)
            comparisons.append({"route": route, "control": CONTROLS[route], "window": window, "difference": found})
    add_holm(comparisons, "difference", "p_value")
    return {"baseline": baseline, "cells": cells, "comparisons": comparisons}


def write_files(folder: Path, summary: dict[str, Any]) -> None:
    """Write the table of cells as Parquet, the figures and the report, all from the summary."""
    from .knockout_figures import draw

    entries = [{"setting": name, **cell} for name, found in summary["settings"].items() for cell in found["cells"]]
    write_report(folder, entries, draw(summary, folder), format_report(summary))


def format_report(summary: dict[str, Any]) -> str:
    """The figures as Markdown, shares in percent with 95 % intervals."""
    support, probe = summary["support"], summary["probe"]
    limits = "; ".join(f"layer {layer}: {reason}" for layer, reason in support["reasons"].items())
    lines = [
        f"# On which routes the answer travels: {summary['model']}",
        f"{summary['data']} ({summary['split']}), seed {summary['seed']}. In the layers of a window no destination "
        "reads a source; the rest of its attention is renormalised by the softmax. *Kept* is the share of answers, "
        "right without a cut, that stay right (the first token decides); intervals are 95 %. p: McNemar's exact test "
        "against no cut, Holm-corrected over the whole table of a setting; an asterisk marks p < 0.05.",
        f"Measured inside the {support['kernel']} kernel on the first picture, in layers {probe['layers']}: largest "
        f"weight on a cut edge {probe['largest_blocked_weight']:g}, where the sources of a route had at least "
        f"{probe['smallest_weight_before']:.3f} of the attention before. "
        + (f"Layers that cannot be cut: {limits}." if limits else "All layers can be cut."),
    ]
    for setting, found in summary["settings"].items():
        lines += _setting_lines(setting, found)
    steps = "; ".join(f"{step['step']}: {step['left']} left" for step in summary["funnel"])
    lines.append(
        "Groups: `object` the tokens that the object covers, +k with k rings; `outside+1` all other visual tokens; "
        "`last-row` the last row of visual tokens; `question` all text between the picture and the last position; "
        "`last` the position that answers; `translated+1` the same shape elsewhere; `random-like-question` as many "
        "visual tokens off the object as the question has. A column that is source and destination keeps reading "
        "itself."
    )
    lines.append(f"Selection of pictures: {steps}.")
    return "\n\n".join(lines)


def _setting_lines(setting: str, found: dict[str, Any]) -> list[str]:
    cells = [cell for cell in found["cells"] if cell["head"] < 0]
    windows = list(dict.fromkeys(cell["window"] for cell in cells))
    layers = {cell["window"]: cell["layers"] for cell in cells}
    by_cell = {(cell["route"], cell["window"]): cell for cell in cells}
    head = ["route", "images", "sources", "destinations"]
    head += [f"{window} ({_span(layers[window])})" for window in windows]
    kept, margins = [head], [head[:1] + head[4:]]
    for route in dict.fromkeys(cell["route"] for cell in cells):
        own = [by_cell.get((route, window)) for window in windows]
        some = next(cell for cell in own if cell)
        kept.append(
            [
                route,
                str(some["images"]),
                f"{some['sources']:.0f}",
                f"{some['destinations']:.0f}",
                *(_kept(cell) for cell in own),
            ]
        )
        margins.append(
            [route, *("–" if not cell or not cell["margin_change"] else nats(cell["margin_change"]) for cell in own)]
        )
    pairs = [["route", "control", "window", "destroys more by, points", "images", "p"]]
    for entry in found["comparisons"]:
        own_pair = entry["difference"]
        if own_pair is not None:
            pairs.append(
                [entry["route"], entry["control"], entry["window"], percent(own_pair, signed=True),
                 str(own_pair["n"]), p_text(own_pair["p_holm"])]
            )  # fmt: skip
    right = found["baseline"]["accuracy"]
    paper = sum(route in PAPER_ROUTES for route in dict.fromkeys(cell["route"] for cell in cells))
    text = [
        f"## {setting}",
        f"Without a cut {percent(right)} % of {right['n']} answers are right. The first {paper} routes are those of "
        "arXiv 2410.07149. Kept, %:"
        if paper
        else "Kept, %:",
        markdown_table(kept),
        "Change of the answer's margin over its best rival, nats:",
        markdown_table(margins),
    ]
    if len(pairs) > 1:
        text += ["Against matched controls, sign-flip test, Holm-corrected:", markdown_table(pairs)]
    return text


def _kept(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["destroyed"] is None:
        return "–"
    lost = cell["destroyed"]
    kept = {"value": 1 - lost["value"], "low": 1 - lost["high"], "high": 1 - lost["low"]}
    return percent(kept) + ("*" if cell["test"]["p_holm"] < 0.05 else "")


def _span(layers: list[int]) -> str:
    if not layers:
        return "none"
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])
