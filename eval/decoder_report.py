"""The decoder table as text and as a figure, both from the object that ``dualstream decoders`` writes to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .decoder_metrics import BASELINE, BY_ID
from .decoder_questions import CONTROL_MAP, ORACLE
from .reading_agreement import METHODS
from .scene_questions import FULL
from .statistics import Estimate

# figure -> heading; differences are signed.
AGREEMENT = {
    "top1": "top-1 %",
    "top1_gain": "gain, points",
    "top5": "top-5 %",
    "boundary_f1": "boundary F1 %",
    "boundary_f1_gain": "gain, points",
    "meaningless_f1": "meaningless F1 %",
}
KEPT = {f"{name}{BY_ID}": method for name, method in METHODS.items()}
BY_CLASS = {
    "top1_by_class": "top-1 %",
    "boundary_f1_by_class": "boundary F1 %",
    "other_share": "truly other %",
    "top1_of_linear": "by text, of linear's %",
    "top1_by_class_of_linear": "by class, of linear's %",
}
COSTS = ("classes", "own parameters", "adds MB", "multiply-adds", "of an LLM token %")
SIGNED = ("gain", "difference")


def format_report(payload: dict[str, Any]) -> str:
    """All tables as aligned text, with 95 % intervals in brackets."""
    rows, settings = payload["readers"], payload["settings"]
    blocks = [_cost_table(rows, payload["manifest"]["model"]), _agreement_table(rows, settings)]
    blocks.append(
        _estimate_table(rows, KEPT, lambda n: f"Share of tokens kept, minus the map's, points ({n} pictures)")
    )
    if payload["class_space"] is not None:
        blocks.append(_class_table(rows, payload["class_space"]))
    if settings["questions"]:
        blocks.append(_answer_table(rows, settings["method"]))
    blocks.append(_published_table(payload["published_sizes"]))
    return "\n\n".join(blocks)


def align(lines: list[list[str]]) -> str:
    """Lay out cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in lines)


def _cell(estimate: dict[str, Any] | None, signed: bool = False) -> str:
    return "" if estimate is None else Estimate(**estimate).percent(signed=signed)


def _cost_table(rows: list[dict[str, Any]], model: str) -> str:
    lines = [["reader", "kind", *COSTS]]
    for row in rows:
        cost = row["cost"]
        if cost is None:
            continue
        lines.append([row["name"], cost["kind"], *_numbers(cost)])
    context = next(row["cost"]["context_length"] for row in rows if row["name"] == BASELINE)
    title = (
        f"Cost at {model}: parameters in bfloat16 with tables, multiply-adds per visual token, and their\n"
        f"share of one prompt token's way through the language model ({context:,} keys attended to)"
    )
    return f"{title}\n{align(lines)}"


def _numbers(cost: dict[str, Any]) -> list[str]:
    """Classes, own parameters, megabytes, multiply-adds and share, as far as they are known."""
    whole = {
        name: f"{cost[name]:,}" if name in cost else "" for name in ("num_classes", "parameters", "multiply_adds")
    }
    share = f"{100 * cost['share_of_llm_token']:.2f}"
    return [whole["num_classes"], whole["parameters"], f"{cost['megabytes']:.2f}", whole["multiply_adds"], share]


def _agreement_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    depth = "the last block" if settings["depth"] is None else f"block {settings['depth']}"
    norm = "with" if settings["final_norm"] else "without"
    return _estimate_table(
        rows,
        AGREEMENT,
        lambda n: (
            f"Agreement with the language model's own map after {depth}, {norm} final norm, on {n} pictures;\n"
            "readings compared by text; gains are paired differences to the unembedding"
        ),
    )


def _class_table(rows: list[dict[str, Any]], class_space: str) -> str:
    return _estimate_table(
        rows,
        BY_CLASS,
        lambda n: (
            f"The same with all readings mapped to the classes of {class_space}, on {n} pictures;\n"
            "truly other: cells whose true reading has no class of its own"
        ),
    )


def _estimate_table(rows: list[dict[str, Any]], columns: dict[str, str], title: Callable[[int], str]) -> str:
    measured = [row for row in rows if row["agreement"]]
    shown = {name: head for name, head in columns.items() if any(name in row["agreement"] for row in measured)}
    lines = [["reader", *shown.values()]]
    for row in measured:
        cells = [_cell(row["agreement"].get(name), any(word in name for word in SIGNED)) for name in shown]
        lines.append([row["name"], *cells])
    return f"{title(measured[0]['agreement']['top1']['n'])}\n{align(lines)}"


def _answer_table(rows: list[dict[str, Any]], method: str) -> str:
    lines = [["reader", "accuracy %", f"to {FULL}", f"to {BASELINE}", f"to {ORACLE}", "fewer tokens %"]]
    for row in rows:
        arm = row["answers"]
        differences = [_cell(arm[f"difference_to_{other}"], signed=True) for other in (FULL, BASELINE, ORACLE)]
        reduction = _cell(arm["reduction_rate"]) if arm["arm"] != FULL else "0"
        lines.append([row["name"], _cell(arm["accuracy"]), *differences, reduction])
    n = rows[0]["answers"]["accuracy"]["n"]
    title = f"{n} held-out questions, one per scene, pictures compressed by {method}; differences in points"
    return f"{title}\n{align(lines)}"


def _published_table(published: dict[str, list[dict[str, Any]]]) -> str:
    lines = [["model", "decoder", *COSTS]]
    for model, costs in published.items():
        lines += [[model, cost["kind"], *_numbers(cost)] for cost in costs]
    return (
        "Cost at published sizes; pruned with the most classes within 1 % of an LLM token and 50 MB. factored adds\n"
        "little memory but costs more time than linear: it applies the whole output matrix after its own\n"
        f"{align(lines)}"
    )


def draw_figure(summary: Path, target: Path) -> None:
    """Draw agreement, boundaries, answers and cost of every reader from a summary on disk into a PNG file.

    Args:
        summary: what ``dualstream decoders --out`` wrote.
        target: the picture.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'dualstream[train]'") from error

    payload = json.loads(summary.read_text(encoding="utf-8"))
    settings = payload["settings"]
    rows = [row for row in payload["readers"] if row["name"] != FULL]
    panels: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any] | None]]] = [
        ("top-1 agreement, %", lambda row: (row["agreement"] or {}).get("top1")),
        ("run-boundary F1, %", lambda row: (row["agreement"] or {}).get("boundary_f1")),
    ]
    if settings["questions"]:
        panels.append((f"answers right under {settings['method']}, %", lambda row: row["answers"]["accuracy"]))
    figure = Figure(figsize=(3.4 * (len(panels) + 1), 0.9 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 1, sharey=True)
    for panel, (title, estimate_of) in zip(axes, panels, strict=False):
        _draw_estimates(panel, rows, estimate_of)
        panel.set_title(title, fontsize="medium")
    _draw_costs(axes[-1], rows)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].invert_yaxis()
    first = rows[0]["agreement"]["top1"]["n"]
    figure.supxlabel(
        f"{payload['manifest']['model']}, {first} pictures, {settings['questions']} questions; "
        "95 % intervals; oracle agrees by definition",
        fontsize="small",
    )
    figure.savefig(target, dpi=120, metadata={"Software": None})


def _draw_estimates(axes: Any, rows: list[dict[str, Any]], estimate_of: Callable[[dict[str, Any]], Any]) -> None:
    for place, row in enumerate(rows):
        estimate = estimate_of(row)
        if estimate is None:
            continue
        value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
        colour = {BASELINE: "#777777", ORACLE: "#0072b2", CONTROL_MAP: "#d55e00"}.get(row["name"], "#009e73")
        axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
    axes.grid(axis="x", alpha=0.3)


def _draw_costs(axes: Any, rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        if row["cost"] is not None:
            share = 100 * row["cost"]["share_of_llm_token"]
            axes.barh(place, share, height=0.5, color="#bbbbbb")
            axes.text(share, place, f" {share:.3g}", va="center", fontsize="small")
    axes.set_xscale("log")
    axes.set_xmargin(0.2)
    axes.set_title("cost per visual token, % of an LLM token", fontsize="medium")
