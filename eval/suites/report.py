"""The comparison as Markdown, as aligned text and as a figure, all from ``summary.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dualstream.eval.statistics import Estimate

from .benchmarks import PUBLISHED_NOTE, REDUCTION, published
from .summary import MEAN, REFERENCE

SPREAD = 0.9  # percentage points between markers that would cover each other
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
COLUMNS = (
    "arm",
    "accuracy %",
    "difference, points",
    "to the method after @",
    "retention %",
    "fewer tokens %",
    "ms per request",
    "KV cache, kB",
)
NOTES = (
    "Brackets: 95 % intervals. Accuracy on one task: Wilson, at the effective size where items share a picture, pair "
    "or set; everything else: bootstrap over pictures, pairs or sets. Differences and retentions are paired on the "
    "same items: with `none`, and where a baseline keeps as many tokens as a method, with that method. A mean gives "
    "every task the same weight.",
    "Fewer tokens: 1 - kept / all visual tokens. KV cache: keys and values of the prompt, per request. Time: median "
    "over batches, of the model's work alone, reading the picture and planning included; baselines with `@METHOD` "
    "first run the method they are matched with, and `llm_map` runs part of the language model twice, so their times "
    "are no offers.",
)


def group_tables(rows: Sequence[dict[str, Any]]) -> str:
    """All tables as Markdown."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for group in dict.fromkeys(row["group"] for row in rows if row["model"] == model):
            chosen = [row for row in rows if (row["model"], row["group"]) == (model, group)]
            parts.append(_group(model, group, chosen))
    shown = any(row["published"] for row in rows)
    return "\n\n".join([*parts, *NOTES, *([PUBLISHED_NOTE] if shown else [])]) + "\n"


def _group(model: str, group: str, rows: Sequence[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    top = [row for row in rows if row["task"] == tasks[-1]]
    name = f"mean of {len(tasks) - 1} tasks" if tasks[-1] == MEAN else tasks[0]
    n = top[0]["accuracy"]["n"]
    lines = [f"### {model}: {group}", f"{name}; {top[0]['items']} items in {n} independent units"]
    lines.append(_table(COLUMNS, [_overall(row) for row in top]))
    if len(tasks) > 1:
        lines.append("Accuracy % by task:")
        single = tasks[:-1]
        by = {(row["task"], row["arm"]): row for row in rows}
        head = ["arm", *(f"{_short(task)} (n = {by[task, REFERENCE]['accuracy']['n']})" for task in single)]
        arms = [row["arm"] for row in top]
        lines.append(_table(head, [[arm, *(_percent(by[task, arm]["accuracy"]) for task in single)] for arm in arms]))
    for kind in ("pair", "set"):
        found = [row for row in rows if kind in row]
        if found:
            names = list(dict.fromkeys(row["task"] for row in found))
            by = {(row["task"], row["arm"]): row for row in found}
            head = ["arm", *(f"{_short(task)} (n = {by[task, REFERENCE][kind]['n']})" for task in names)]
            arms = list(dict.fromkeys(row["arm"] for row in found))
            body = [[arm, *(_percent(by[task, arm][kind]) for task in names)] for arm in arms]
            lines.append(f"Whole {kind}s right, %:\n\n{_table(head, body)}")
    paper = _published(model, rows, tasks)
    return "\n\n".join([*lines, *paper])


def _overall(row: dict[str, Any]) -> list[str]:
    kilobytes = Estimate(**{k: v if k == "n" else v / 1000 for k, v in row["kv_bytes"].items()})
    milliseconds = Estimate(**{k: v if k == "n" else 1000 * v for k, v in row["seconds"].items()})
    return [
        f"`{row['arm']}`",
        _percent(row["accuracy"]),
        "" if row["difference"] is None else _percent(row["difference"], signed=True),
        "" if row["difference_to_matched"] is None else _percent(row["difference_to_matched"], signed=True),
        "" if row["retention"] is None else _percent(row["retention"]),
        _percent(row["reduction_rate"]) if row["reduction_rate"]["high"] > 0 else "0",
        _plain(milliseconds),
        _plain(kilobytes),
    ]


def _published(model: str, rows: Sequence[dict[str, Any]], tasks: list[str]) -> list[str]:
    """Table of what the paper reports for the arms and tasks of this group, if it does."""
    found = [p for row in rows for p in row["published"]]
    if not found:
        return []
    names = [task for task in tasks if any(p["task"] == task for p in found)]
    body = []
    for source in dict.fromkeys(p["model"] for p in found):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            values = {p["task"]: p["value"] for p in found if (p["model"], p["arm"]) == (source, arm.split(":")[-1])}
            if values:
                reduction = [p for p in published(model, REDUCTION, arm) if p.model == source]
                cells = [f"{values[task]:.2f}" if task in values else "" for task in names]
                body.append([f"`{arm}`, {source}", *cells, *(f"{p.value:.2f}" for p in reduction)])
    return ["Published (not run here):", _table(["arm, model", *map(_short, names), "fewer tokens %"], body)]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against tokens saved, a panel per model and group.

    Args:
        rows: of ``summarize``.
        path: PNG to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the figure needs matplotlib: pip install 'dualstream[eval]'") from error
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != REFERENCE]
    with rc_context({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.0 * len(groups) + 1.6, 2.9 * len(models)), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(models), len(groups), squeeze=False)
        for panel, (model, group) in zip(panels.flat, ((m, g) for m in models for g in groups), strict=True):
            chosen = [row for row in rows if (row["model"], row["group"]) == (model, group)]
            last = chosen[-1]["task"]
            _panel(panel, {row["arm"]: row for row in chosen if row["task"] == last}, arms)
            panel.set_title(f"{model}: {group}" + (" (mean of tasks)" if last == MEAN else f" ({last})"), loc="left")
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})


def _panel(panel: Any, rows: dict[str, dict[str, Any]], arms: list[str]) -> None:
    full = rows[REFERENCE]["accuracy"]
    panel.axhspan(100 * full["low"], 100 * full["high"], color="#8A8A8A", alpha=0.18, linewidth=0)
    panel.axhline(100 * full["value"], color="#8A8A8A", linewidth=1, label=f"{REFERENCE} (95 % interval)")
    places = _spread({arm: 100 * rows[arm]["reduction_rate"]["value"] for arm in arms})
    for arm, (color, marker) in zip(arms, _looks(arms), strict=True):
        x, y = rows[arm]["reduction_rate"], rows[arm]["accuracy"]
        panel.errorbar(
            places[arm],
            100 * y["value"],
            xerr=_whiskers(x),
            yerr=_whiskers(y),
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1,
            label=arm,
        )
    panel.set(xlabel="fewer visual tokens, % (equal ones side by side)", ylabel="accuracy, %")
    panel.grid(color="#E3E3E3", linewidth=0.6)
    panel.set_axisbelow(True)


def _looks(arms: list[str]) -> list[tuple[str, str]]:
    """Colour and marker: methods are circles, baselines have a colour for the rule and a marker for the budget."""
    parts = [arm.partition("@") for arm in arms]
    rules = list(dict.fromkeys(rule for rule, at, _ in parts if at))
    budgets = list(dict.fromkeys(budget for _, at, budget in parts if at))
    methods = [rule for rule, at, _ in parts if not at]
    looks = []
    for rule, at, budget in parts:
        number = (rules if at else methods).index(rule)
        looks.append((PALETTE[number % len(PALETTE)], "sD^vPX"[budgets.index(budget) % 6] if at else "o"))
    return looks


def _spread(values: dict[str, float], width: float = SPREAD) -> dict[str, float]:
    """Move values that would lie on each other apart by `width`, around where they are."""
    places: dict[str, float] = {}
    group: list[str] = []
    for arm in sorted(values, key=lambda name: values[name]):
        if group and values[arm] - values[group[-1]] >= width:
            group = []
        group.append(arm)
        centre = sum(values[name] for name in group) / len(group)
        for rank, name in enumerate(group):
            places[name] = centre + (rank - (len(group) - 1) / 2) * width
    return places


def _whiskers(estimate: dict[str, Any]) -> list[list[float]]:
    return [
        [max(100 * (estimate["value"] - estimate["low"]), 0)],
        [max(100 * (estimate["high"] - estimate["value"]), 0)],
    ]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _percent(estimate: dict[str, Any], signed: bool = False) -> str:
    return Estimate(**estimate).percent(signed=signed)


def _plain(estimate: Estimate) -> str:
    if estimate.low == estimate.high:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"


def _short(task: str) -> str:
    for start in ("scenes_",):
        task = task.removeprefix(start)
    return task.removesuffix("_fair").removesuffix("_paper")
