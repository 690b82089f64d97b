"""The report of a run in plain words, from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
VERDICTS = {
    "top1_chosen": "Best words",
    "graded_chosen": "Graded (nats)",
    "top1_last": "Best words",
    "graded_last": "Graded (nats)",
}


def interval(estimate: Row | None, digits: int = 3) -> str:
    """An estimate as ``0.912 [0.880, 0.941]``; a dash for none."""
    if estimate is None:
        return "–"
    value, low, high = (f"{estimate[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(summary: Row, manifest: Row, figures: Sequence[str]) -> str:
    """Write the report as Markdown.

    Args:
        summary: of the run.
        manifest: how it was made.
        figures: names of the pictures beside it.
    """
    parts = [_head(summary, manifest), _depths(summary)]
    if "emergence" in summary:
        parts += [_emergence(summary), _stages(summary), _presence(summary), _regions(summary)]
    if summary.get("inside"):
        parts.append(_inside(summary))
    if "lenses" in summary:
        parts.append(_lenses(summary))
    if summary.get("throughput"):
        parts.append(_throughput(summary["throughput"]))
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(summary: Row, manifest: Row) -> str:
    own = f"{summary['native_vision_depth']} of {summary['vision_blocks']} vision blocks"
    if "choice" in summary and summary["options"]["llm_depth"] is None:
        how = f"chosen on {summary['choice']['images']} validation pictures"
    else:
        how = "as asked for" if summary["options"]["llm_depth"] is not None else "the last, as there are no objects"
    lines = [
        f"# What {summary['model']} reads, by depth",
        f"`{manifest['command']}`, seed {manifest['seed']}.",
        f"{summary['images']} pictures. The model's own features come after {own}. Unless it says otherwise, readings "
        f"are taken after {summary['llm_depth']} of {summary['llm_blocks']} language-model blocks ({how}), with the "
        "final norm. Intervals are 95 %, over pictures.",
    ]
    if summary["unreadable_labels"]:
        lines.append(f"No vocabulary entry says these labels: {', '.join(summary['unreadable_labels'])}.")
    return "\n\n".join(lines)


def _depths(summary: Row) -> str:
    flow = summary["flow"]
    rows = [
        [
            str(row["vision_depth"]),
            ", ".join(f"{word or '∅'} {100 * share:.0f} %" for word, share in row["common"][:5]),
            interval(row["meaningful"], 2),
            interval(row["agreement"], 2),
            f"{interval(row['agreement_last'], 2)} / {interval(row['agreement_last_norm_matched'], 2)}",
            interval(flow["feature_cosine"][number], 2),
            interval(flow["feature_norm_ratio"][number], 2),
        ]
        for number, row in enumerate(summary["words"])
    ]
    header = [
        "vision blocks",
        "commonest words",
        "cells that say a word",
        "same word as native depth",
        "same after all LLM blocks: as is / norms matched",
        "cosine of features to native ones",
        "norm ratio",
    ]
    return f"## Readings by vision depth\n\n{table(header, rows)}"


def _emergence(summary: Row) -> str:
    rows = [
        [
            "connector" if row["llm_depth"] is None else str(row["llm_depth"]),
            row["lens"],
            interval(row["emergence"]),
            interval(row["control"]),
            interval(row["gain"]),
        ]
        for row in sorted(summary["emergence"], key=lambda r: -1 if r["llm_depth"] is None else r["llm_depth"])
    ]
    header = ["LLM blocks", "lens", "cells in boxes that name the object", "with random labels", "gain"]
    values = summary["choice"]["emergence"]
    spread = max(values) - min(values)
    note = f"On validation pictures the depths differ by {spread:.3f} at most" + (
        ", so that the choice hardly matters." if spread < 0.02 else "."
    )
    return f"## Choosing the language-model depth\n\n{note}\n\n{table(header, rows)}"


def _stages(summary: Row) -> str:
    stages = summary["stages"]
    rows = []
    for number in range(len(stages["chosen"]["name"])):
        row = [str(number)]
        for place, names in (
            ("chosen", ("attribute", "attribute_control", "name", "name_control")),
            ("last", ("graded_attribute", "graded_name")),
        ):
            row += [interval(stages[place][name][number]) if name in stages[place] else "–" for name in names]
        rows.append(row)
    header = ["vision blocks", "r_A", "r_A, other words", "r_R", "r_R, other words", "graded attribute", "graded name"]
    lines = ["## Two stages: attributes first, then names?"]
    lines.append(
        "It holds if own attributes are said above chance at some depth, fall from there to the native depth, own "
        "names rise, and their change point comes later, each with its whole interval; it does not hold if one of "
        "these is refuted by its whole interval. It is judged four times, with no correction for that."
    )
    for kind, label in VERDICTS.items():
        if f"verdict_{kind}" in stages:
            depth = stages[kind.rpartition("_")[2]]["llm_depth"]
            lines.append(f"**{label}, {depth} LLM blocks:** {verdict_sentence(stages[f'verdict_{kind}'])}")
    return "\n\n".join([*lines, table(header, rows)])


def verdict_sentence(verdict: Row) -> str:
    """What the figures say about two stages, in one paragraph."""
    outcome = "holds" if verdict["holds"] else "does not hold" if verdict["fails"] else "is undecided"
    return (
        f"the claim {outcome}. Own attributes are {interval(verdict['attributes_at_peak'])} above chance at their "
        f"peak, after {verdict['peak_on_validation']} vision blocks (found on validation pictures), and fall by "
        f"{interval(verdict['fall_of_attributes'])} from there to the native depth; own names rise by "
        f"{interval(verdict['rise_of_names'])}. On the test pictures the change point of names lies at "
        f"{interval(verdict['name_change'], 1)} vision blocks, the peak of attributes at "
        f"{interval(verdict['attribute_peak'], 1)}."
    )


def _presence(summary: Row) -> str:
    found = summary.get("presence")
    if not found:
        return ""
    rows = []
    for depth, row in enumerate(found["by_depth"]):
        cells = [
            interval(row[rule][name], 2) for rule in ("strict", "loose") for name in ("sensitivity", "specificity")
        ]
        accuracy = interval(row["strict"]["accuracy"], 2)
        rows.append([str(depth), *cells, accuracy, interval(row["auroc"]), interval(row["auroc_control"])])
    header = ["vision blocks", "strict: sensitivity", "specificity", "loose: sensitivity", "specificity"]
    header += ["strict: accuracy", "area under ROC", "area, answers shuffled"]
    note = (
        f"{found['questions']} questions on {found['images']} pictures, half of them about what is there; saying no "
        f"to everything is right in {100 * found['always_no']:.0f} % of them."
    )
    return f"## Is it there?\n\n{note}\n\n{table(header, rows)}"


def _regions(summary: Row) -> str:
    regions = summary["regions"]

    def score(name: str, depth: int) -> str:
        return "–" if regions[name][depth] is None else interval(regions[name][depth]["miou"])

    rows = [
        [str(depth), *(score(name, depth) for name in ("raw", "filled", "control"))]
        for depth in range(len(regions["filled"]))
    ]
    header = ["vision blocks", "words as they are", "holes filled", "map of another picture"]
    note = (
        f"Mean IoU over {len(regions['labels'])} labels, background left out. Cells that all say their commonest true "
        f"label reach {interval(regions['cell_majority']['miou'])}: the grid is coarse."
    )
    return f"## Regions against masks\n\n{note}\n\n{table(header, rows)}"


def _inside(summary: Row) -> str:
    titles = {"similarity": "cosine", "attention": "attention (1 = uniform)", "clusters": "adjusted Rand index"}
    rows = [
        [
            title,
            str(row["vision_depth"]),
            *(interval(row.get(key), 2) for key in ("inside", "others", "outside", "copies", "paired")),
        ]
        for name, title in titles.items()
        for row in summary["inside"][name]
    ]
    header = ["figure", "vision blocks", "inside objects", "to other objects", "to the ground", "control"]
    header.append("inside − control, same objects")
    note = (
        "The control of cosine and attention is a set of the same size and shape moved to where no object is; that of "
        "clusters are the objects of another picture. Flat ground is alike by itself, which is why means over objects "
        "alone say little."
    )
    return f"## Do cells of an object belong together?\n\n{note}\n\n{table(header, rows)}"


def _lenses(summary: Row) -> str:
    rows = [
        [str(row["llm_depth"]), row["lens"], interval(row["agreement"]), interval(row["divergence"])]
        for row in summary["lenses"]["table"]
    ]
    gains = [
        [str(row["llm_depth"]), interval(row["agreement"]), interval(row["divergence"])]
        for row in summary["lenses"]["tuned_minus_normed"]
    ]
    header = ["LLM blocks", "lens", "same word as the last depth", "divergence, nats"]
    difference = table(["LLM blocks", "tuned − normed: same word", "tuned − normed: divergence, nats"], gains)
    return f"## Lenses side by side\n\n{table(header, rows)}\n\n{difference}"


def _throughput(found: Row) -> str:
    header = ["way", "pictures per second", "seconds per picture", "speed-up"]
    rows = [
        [name, f"{row['images_per_second']:.2f}", interval(row["seconds"], 4), interval(row["speedup"], 2)]
        for name, row in found["ways"].items()
    ]
    memory = ", ".join(f"{row['depths']}: {row['peak_mib']:.1f}" for row in found["memory"])
    note = (
        f"{found['images']} pictures, {found['rounds']} rounds, the ways in turn in one process, in {found['clock']}. "
        f"All read {found['depths']} vision depths; the first and the last way say the same word in "
        f"{100 * found['same_words']:.1f} % of the cells. Peak of live tensors beyond the weights, MiB, by number of "
        f"vision depths read: {memory}."
    )
    return f"## Throughput\n\n{note}\n\n{table(header, rows)}"
