"""The summary as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dualstream.eval.statistics import Estimate

from .design import IN, OUT, TUNED
from .published import BENCHMARKS, published_cell
from .scoring import METRICS

PLACES = {IN: "as trained", TUNED: "as fine-tuned", OUT: "seen by neither"}
OTHERS = {"rebase": "of type exp (a table of another base)", "lowered": "of those that lower frequencies"}


def format_report(summary: Mapping[str, Any]) -> str:
    """All tables and the sentence, as Markdown; figures in percent and points with 95 % intervals in brackets."""
    design, forms = summary["design"], summary["design"]["forms"]
    blocks = [
        "# RoPE scaling and where-questions",
        f"**{summary['sentence']}**",
        _scope(summary),
        _method(summary),
        f"## {_cap(forms[0])} questions (the conclusion is about these)",
        _main_table(summary, forms[0]),
        _difference_table(summary, forms[0]),
        *(["Not run: " + ", ".join(map(arm_name, summary["not_run"])) + "."] if summary["not_run"] else []),
        *(block for form in forms[1:] for block in (f"## {_cap(form)} questions", _main_table(summary, form))),
        "## Single conditions, individual accuracy",
        *(f"{_cap(form)}:\n\n{_condition_table(summary, form)}" for form in forms),
        "## Mirror images, other questions, answers that are none of the options",
        _other_table(summary),
        "## How the scaling was chosen",
        _choice(summary),
    ]
    if any(
        any(scaling and scaling.get("grid_sizes") is None for scaling in arm["scalings"]) for arm in summary["arms"]
    ):
        blocks += ["## What the arms do to the frequencies", _scaling_table(summary)]
    if summary.get("latency"):
        blocks += ["## Cost at run time", _latency(summary["latency"])]
    blocks += ["![Accuracy of all arms](arms.png)", "![The grid on validation pictures](grid.png)"]
    blocks.append(
        f"Made by `{summary['manifest']['command']}`; all figures: `summary.json`. Model: {design['model']}."
    )
    return "\n\n".join(blocks) + "\n"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first the heading, as a Markdown table."""
    head, *body = lines
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def arm_name(arm: Mapping[str, Any]) -> str:
    """An arm as the tables call it: baseline, +scaling, +SFT, +SFT+scaling, and the controls."""
    name = {"stock": "", "scaled": "+scaling", "table": "+learned table"}.get(arm["arm"], f"+{arm['arm']}")
    return f"{'+SFT' if arm['tuned'] else ''}{name}" or "baseline"


def cell(estimate: Mapping[str, Any] | None, signed: bool = False) -> str:
    """An estimate as text; empty where there is none."""
    if estimate is None:
        return ""
    return Estimate(*(estimate[name] for name in ("value", "low", "high", "n"))).percent(signed=signed)


def _cap(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _scope(summary: Mapping[str, Any]) -> str:
    choice = summary["choice"]
    return (
        f"This is about `{summary['design']['model']}` on drawn scenes and about the scalings chosen on validation "
        f"pictures, `{choice['plain']}` without and `{choice['tuned']}` with fine-tuning; it says nothing of larger "
        "models."
    )


def _method(summary: Mapping[str, Any]) -> str:
    design, manifest = summary["design"], summary["manifest"]
    conditions = "; ".join(
        f"{c['name']} ({PLACES[c['distribution']]}): arrangement x {c['scale']:g}, "
        f"{c['pixels']} pixels, aspect {c['aspect']:g}"
        for c in design["conditions"]
    )
    return (
        "Pictures in What's-Up form: sets of four that differ in nothing but the relation of two objects (left, "
        "right, above, below); inside each pair of a set one object stands still. *Individual*: single pictures; "
        f"*pair*: both pictures of a pair; *set*: all four. Conditions: {conditions}. {design['test_sets']} object "
        "pairs per condition, the same for all arms. An answer is the likeliest of the options; whether the model "
        "would have said one of them is counted apart. Intervals: bootstrap over object pairs and, where an arm has "
        f"several, over runs ({manifest['runs']['tuned']} fine-tuning runs per arm, {manifest['runs']['draws']} draws "
        "of random controls); differences are paired on the same pictures. Few runs give intervals that are "
        "rather too narrow, so a verdict also asks that all runs point the same way."
    )


def _main_table(summary: Mapping[str, Any], form: str) -> str:
    published = f"published, % ({' / '.join(BENCHMARKS)}; Qwen2-VL-2B)"
    heads = [f"{metric} {PLACES[place]}" for place in _distributions(summary) for metric in METRICS]
    lines = [["arm", "runs", *(f"{head} %" for head in heads), published]]
    for arm in summary["arms"]:
        cells = [cell(arm["accuracy"][place][form][m]) for place in _distributions(summary) for m in METRICS]
        lines.append([arm_name(arm), str(arm["runs"]), *cells, published_cell(arm["arm"], arm["tuned"])])
    return (
        f"{markdown_table(lines)}\n\nThe published column is the paper's Table 2: another model, photographs, "
        "accuracy of single pictures, scalings chosen on the test sets, no intervals. It stands here "
        "for its direction only."
    )


def _difference_table(summary: Mapping[str, Any], form: str) -> str:
    """Paired differences in individual accuracy to the baseline and to the stock tower with the same tuning."""
    places = _distributions(summary)
    lines = [
        [
            "arm",
            *(f"to baseline, {PLACES[place]}" for place in places),
            *(f"to stock tower, same tuning, {PLACES[place]}" for place in places),
            "each run, same tuning",
        ]
    ]
    for arm in summary["arms"]:
        first, second = arm["difference_to_baseline"], arm["difference_to_stock"]
        second = second if arm["tuned"] else first
        if first is None:
            continue
        cells = [cell(first[place][form]["individual"], signed=True) for place in places]
        cells += ["" if second is None else cell(second[place][form]["individual"], signed=True) for place in places]
        runs = "" if second is None else "; ".join(_runs(second[place][form]["individual"]) for place in places)
        lines.append([arm_name(arm), *cells, runs])
    return f"Paired differences of individual accuracy, points:\n\n{markdown_table(lines)}"


def _runs(difference: Mapping[str, Any]) -> str:
    return ", ".join(f"{100 * run:+.1f}" for run in difference["runs"])


def _condition_table(summary: Mapping[str, Any], form: str) -> str:
    names = [c["name"] for c in summary["design"]["conditions"]]
    lines = [["arm", *names]]
    lines += [
        [arm_name(arm), *(cell(arm["accuracy"][name][form]["individual"]) for name in names)]
        for arm in summary["arms"]
    ]
    return markdown_table(lines)


def _other_table(summary: Mapping[str, Any]) -> str:
    forms, form = summary["design"]["forms"], summary["design"]["forms"][0]
    heads = ["left/right swap", "above/below stay", "non-spatial questions", "difference to stock, same tuning"]
    lines = [["arm", *heads, *(f"invalid, {name}" for name in forms)]]
    for arm in summary["arms"]:
        flip, other = arm["flip"], arm["non_spatial"]
        lines.append(
            [
                arm_name(arm),
                cell(flip[form]["horizontal"]) if flip else "",
                cell(flip[form]["vertical"]) if flip else "",
                cell(other["all"]) if other else "",
                cell(arm["non_spatial_difference"], signed=True),
                *(cell(arm["invalid"][name]) for name in forms),
            ]
        )
    return (
        f"{markdown_table(lines)}\n\nSwap and stay: answers ({form}) to a picture and to its mirror image that fit "
        "each other, right or wrong. Non-spatial: presence, attributes and counts on other scenes, answered freely."
    )


def _choice(summary: Mapping[str, Any]) -> str:
    choice = summary["choice"]
    others = "".join(
        f" The arm {name} is the best {what}: `{choice[name]}`." for name, what in OTHERS.items() if name in choice
    )
    lines = [["scaling", "tuned", "accuracy %", "nll"]]
    for name, tuned in (("grid", False), ("tuned_grid", True)):
        ranked = sorted(summary[name], key=lambda row: (-row["accuracy"], row["nll"]))
        shown = ranked[:8] + [row for row in ranked[8:] if row["arm"] == "stock"]
        lines += [
            [f"`{row['arm']}`", "yes" if tuned else "no", f"{100 * row['accuracy']:.1f}", f"{row['nll']:.3f}"]
            for row in shown
        ]
    tried = [len(summary[name]) - 1 for name in ("grid", "tuned_grid")]
    pairs = summary["design"]["validation_sets"]
    return (
        f"{tried[0]} scalings were tried without fine-tuning, {tried[1]} with it. Of those that raise frequencies, as "
        f"the method means it, `{choice['plain']}` was chosen without and `{choice['tuned']}` with fine-tuning."
        f"{others} Criterion: {choice['criterion']} ({pairs} object pairs per condition, none in the test). No "
        "test picture was looked at. The best of each grid and the stock tower; the whole grid is in `grid.png` and "
        f"`summary.json`:\n\n{markdown_table(lines)}"
    )


def _scaling_table(summary: Mapping[str, Any]) -> str:
    lines = [["arm", "scaling of each run"]]
    lines += [
        [arm_name(arm), "; ".join(dict.fromkeys(map(_scaling_text, arm["scalings"])))]
        for arm in summary["arms"]
        if any(arm["scalings"])
    ]
    return markdown_table(lines)


def _scaling_text(settings: Mapping[str, Any] | None) -> str:
    from dualstream.modeling import RopeScaling

    if settings is None:
        return "none"
    scaling = RopeScaling.from_any(settings)
    if scaling.values is None:
        return f"`{scaling}`"
    values: Any = scaling.values
    while isinstance(values[0], tuple) and len(values) == 1:
        values = values[0]
    rows = values if isinstance(values[0], tuple) else (values,)
    return "g = " + " | ".join(" ".join(f"{value:.3g}" for value in row) for row in rows)


def _latency(latency: Mapping[str, Any]) -> str:
    def text(name: str) -> str:
        d = latency[name]
        return (
            f"{d['value']:.3f} [{d['low']:.3f}, {d['high']:.3f}], quartiles {d['quartile_1']:.3f} and "
            f"{d['quartile_3']:.3f}"
        )

    return (
        f"Time of a forward pass, {latency['rounds']} rounds in one run, in random order within a round, median "
        f"of the rounds' ratios with its 95 % interval: scaled to stock {text('scaled_to_stock')}; stock to stock "
        f"again {text('stock_to_stock')}. A stock pass takes {latency['stock_ms']:.0f} ms (median, "
        f"{latency['questions']} questions)."
    )


def _distributions(summary: Mapping[str, Any]) -> list[str]:
    present = {c["distribution"] for c in summary["design"]["conditions"]}
    return [place for place in PLACES if place in present]
