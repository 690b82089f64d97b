"""The report and the figure of a replication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dualstream.analysis.figure_style import CONTROL, PALETTE, figure, save

from ..scorers import TRAPS, self_test
from ..settings import SETTINGS
from ..tables import markdown_table, percent
from .neo2024 import DEFECTS, judge_trap
from .protocols import PROTOCOLS
from .replicate_summary import PUBLISHED_LENS

COLORS = {"published": CONTROL, "compatible": PALETTE[1], "corrected": PALETTE[0]}
WHAT_HAPPENED = {"description": "generative and polling", "vqa": "VQA and knockout"}


def format_report(summary: dict[str, Any]) -> str:
    """All tables as Markdown."""
    geometry, scorers = summary["geometry"], summary["scorers"]
    blocks = [
        f"# arXiv 2410.07149 again, on {summary['model']}",
        "*Compatible*: the choices of the paper's public code, re-implemented with their defects. *Corrected*: the "
        "same experiments with exact geometry, whole-word scorers, the right target of the attribution, matched "
        "controls. *Published*: LLaVA-1.5 7B on COCO, as public replications quote it; it is no target for another "
        f"model. Data: {summary['data']} ({summary['split']}), {summary['pictures']} pictures. Intervals are 95 % "
        "(Wilson; with several draws per picture, at the effective sample size). VQA answers are begun with "
        '"It is a", on scenes with nothing.',
        "## Ablation: baseline-correct answers destroyed, %",
        _ablation_table(summary),
        "p: the condition against moved copies of the same size and shape on the same pictures (sign flips, Holm over "
        "all such tests). The public code has no such control.",
        "## Knockout: baseline-correct answers that stay right (VQA, first token)",
        _knockout_table(summary),
        "An asterisk: below 1 at the 5 % level after Holm's correction over the 36 cells (exact McNemar test). "
        "Windows of the compatible column are unequal (D13), those of the corrected one of equal width: "
        f"{_windows(summary)}.",
        "## Lens: cells of the object that read as its class",
        _lens_table(summary),
        "## What the defects do here",
        markdown_table([["", "defect", "compatible column"], *_defects(summary)]),
        "## Selection: pictures",
        _selection_table(summary),
    ]
    if geometry:
        blocks.insert(
            -2,
            f"D1: the public geometry takes {percent(geometry['recall'])} % of an object's true tokens (Jaccard "
            f"{percent(geometry['jaccard'])} %); the sets are equal for {percent(geometry['equal'])} % of the "
            "objects.",
        )
    for row in scorers:
        blocks.insert(
            -2,
            f"D4, D5, {row['setting']}: the two scorers differ on {percent(row['differ'])} % of {row['texts']} texts "
            f"({row['only_compatible']} right only for the public code's, {row['only_corrected']} only for ours).",
        )
    blocks.insert(-2, f"D15, VQA accuracy over all items, baseline-wrong ones included: {_over_all(summary)}.")
    traps = f"Of the {len(TRAPS)} texts of the scorers' self-test, the public code's rules misjudge "
    blocks.insert(-2, f"{traps}{len(self_test(judge_trap))}, ours {len(self_test())}.")
    return "\n\n".join(blocks)


def _ablation_table(summary: dict[str, Any]) -> str:
    rows = [["setting", "tokens replaced by the mean", "published", "compatible", "corrected", "tokens", "p"]]
    by_key = {name: {(r["setting"], r["condition"]): r for r in summary["ablation"][name]} for name in PROTOCOLS}
    keys = dict.fromkeys([*by_key["corrected"], *by_key["compatible"]])
    for setting, condition in sorted(keys, key=lambda key: SETTINGS.index(key[0])):
        if condition == "none":
            continue
        both = [by_key[name].get((setting, condition)) for name in PROTOCOLS]
        known = [row for row in both if row]
        published = known[0]["published"]
        mended = by_key["corrected"].get((setting, condition))
        rows.append(
            [
                setting,
                condition,
                "" if published is None else f"{published:g}",
                *(_destroyed(row) for row in both),
                " / ".join(f"{row['mean_tokens']:.1f}" if row else "–" for row in both),
                "" if not mended or mended["p_holm"] is None else f"{mended['p_holm']:.2g}",
            ]
        )
    return markdown_table(rows)


def _over_all(summary: dict[str, Any]) -> str:
    parts = []
    for name in PROTOCOLS:
        rows = {row["condition"]: row for row in summary["ablation"][name] if row["setting"] == "vqa"}
        keys = [key for key in ("none", "object", "object+1") if key in rows]
        shown = [f"{key} {100 * rows[key]['accuracy_over_all']:.1f}" for key in keys]
        parts.append(f"{name} {', '.join(shown) or 'no picture'}")
    return "; ".join(parts)


def _destroyed(row: dict[str, Any] | None) -> str:
    if not row:
        return "–"
    return "no right baseline" if not row["destroyed"] else f"{percent(row['destroyed'])}, n {row['destroyed']['n']}"


def _knockout_table(summary: dict[str, Any]) -> str:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in PROTOCOLS:
        for row in summary["knockout"][name]:
            found.setdefault((row["route"], row["window"]), {"published": row["published"]})[name] = row
    rows = [["route", "window", "published", *PROTOCOLS]]
    for (route, window), cells in found.items():
        published = cells["published"]
        rows.append(
            [route, window, "" if published is None else f"{published:.2f}", *(_kept(cells.get(n)) for n in PROTOCOLS)]
        )
    return markdown_table(rows) if len(rows) > 1 else "No picture with a question."


def _kept(row: dict[str, Any] | None) -> str:
    if not row:
        return "no right baseline"
    kept = row["kept"]
    star = "*" if row["p_holm"] <= 0.05 and kept["value"] < 1 else ""
    return f"{kept['value']:.2f}{star} [{kept['low']:.2f}, {kept['high']:.2f}], n {kept['n']}"


def _windows(summary: dict[str, Any]) -> str:
    parts = []
    for name in PROTOCOLS:
        shown = ", ".join(f"{window} {layers[0]}–{layers[-1]}" for window, layers in summary["windows"][name].items())
        parts.append(f"{name} {shown}")
    return "; ".join(parts)


def _lens_table(summary: dict[str, Any]) -> str:
    rows = [["", "published", *PROTOCOLS]]
    lens = [summary["lens"][name] for name in PROTOCOLS]
    share, depth = PUBLISHED_LENS["share"], PUBLISHED_LENS["depth"]

    def cells(show: Any) -> list[str]:
        return ["–" if each is None else show(each) for each in lens]

    rows.append(
        [
            "best depth per picture, in-sample, %",
            f"{100 * share:g}",
            *cells(lambda x: percent(x["per_picture_maximum"])),
        ]
    )
    rows.append(
        [
            "mean best depth, of entries",
            f"{depth} of {PUBLISHED_LENS['entries']}",
            *cells(lambda x: "no hit" if x["mean_depth"] is None else f"{x['mean_depth']:.1f} of {x['entries']}"),
        ]
    )
    rows.append(["one depth, cross-fitted, %", "", *cells(lambda x: percent(x["one_depth"]["cross_fitted"]))])
    rows.append(["last entry, %", "", *cells(lambda x: percent(x["by_depth"][-1]))])
    return markdown_table(rows)


def _selection_table(summary: dict[str, Any]) -> str:
    rows = [["for", "what happened", *PROTOCOLS]]
    for setting, title in WHAT_HAPPENED.items():
        counts = [summary["selection"][name][setting] for name in PROTOCOLS]
        for happened in dict.fromkeys(key for each in counts for key in each):
            rows.append([title, happened, *(str(each.get(happened, 0)) for each in counts)])
    return markdown_table(rows)


def _defects(summary: dict[str, Any]) -> list[list[str]]:
    return [[name, defect.what, defect.column] for name, defect in DEFECTS.items()]


def draw(summary: dict[str, Any], path: Path) -> Path:
    """Draw destroyed answers per setting: published, compatible, corrected, and the matched control."""
    shown = ("object", "moved", "object+1", "moved+1", "object+2", "register", "random-20", "ig-20")
    with figure(1, len(SETTINGS), size=(11, 3.6)) as (fig, axes):
        for panel, setting in zip(axes[0], SETTINGS, strict=True):
            for place, name in enumerate(("published", *PROTOCOLS)):
                rows = {
                    row["condition"]: row for row in summary["ablation"].get(name, []) if row["setting"] == setting
                }
                if name == "published":
                    found = {r["condition"]: r for r in summary["ablation"]["corrected"] if r["setting"] == setting}
                    rows = {key: row for key, row in found.items() if row["published"] is not None}
                for y, condition in enumerate(shown):
                    row = rows.get(condition)
                    if row and name == "published":
                        panel.plot(row["published"], y, "D", color=COLORS[name], markersize=5, zorder=3)
                    elif row and row["destroyed"]:
                        low, value, high = (100 * row["destroyed"][part] for part in ("low", "value", "high"))
                        at = y + (place - 1.5) * 0.36
                        reach = np.array([[value - low], [high - value]])
                        panel.barh(at, value, 0.34, color=COLORS[name], xerr=reach, error_kw={"linewidth": 0.9})
            panel.set_yticks(range(len(shown)), shown if setting == SETTINGS[0] else [""] * len(shown))
            panel.invert_yaxis()
            panel.set(xlim=(0, 101), xlabel="right answers destroyed, %", title=setting)
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        marks: list[Any] = [Patch(color=COLORS[name], label=name) for name in PROTOCOLS]
        published = Line2D(
            [], [], marker="D", linestyle="", color=COLORS["published"], label="published (LLaVA-1.5 7B)"
        )
        fig.legend(handles=[*marks, published], loc="outside lower center", ncols=3)
        return save(fig, path)
