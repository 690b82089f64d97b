"""The report of a run, and one page about several runs, as Markdown from their summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dualstream.eval.statistics import Estimate

VERDICTS = {"yes": "**yes**", "no": "**no**", "open": "open"}
LIMITS = {
    "scenes": "drawn scenes in What's-Up form: four pictures per object pair that differ in the relation alone",
    "whatsup_b": "the pictures of What's Up B: four per object pair",
}


def format_report(summary: Mapping[str, Any]) -> str:
    """All statements first, then every experiment with its tables and figures."""
    manifest, experiments = summary["manifest"], summary["experiments"]
    blocks = [
        f"# Where things are, in {manifest['model']}",
        scope(summary),
        "A statement is decided by a rule that was written down before the figures were known (last column): **yes**, "
        "**no**, or open where the interval allows both. Intervals are 95 %, clustered by object pair unless a table "
        "says otherwise.",
        statements_table(experiments),
        *(f"Not run on this model: {title(name)} ({reason})." for name, reason in summary["skipped"].items()),
    ]
    for experiment in experiments.values():
        blocks += [f"## {experiment['title']}", experiment["question"]]
        blocks += [format_table(table) for table in experiment["tables"]]
        blocks += [f"![{experiment['title']}]({figure})" for figure in experiment["figures"]]
    blocks += ["## Cost", cost_table(experiments), f"Made by `{manifest['command']}`; figures: `summary.json`."]
    return "\n\n".join(blocks) + "\n"


def format_page(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The statements of several runs side by side.

    Args:
        summaries: run name -> summary.
    """
    names = list(summaries)
    titles = {name: each["title"] for run in summaries.values() for name, each in run["experiments"].items()}
    blocks = []
    for experiment, heading in titles.items():
        lines = [["statement", *(f"{name}" for name in names), "control", "rule"]]
        found: dict[str, dict[str, Any]] = {}
        for name, run in summaries.items():
            for finding in run["experiments"].get(experiment, {"findings": []})["findings"]:
                found.setdefault(finding["statement"], {})[name] = finding
        for statement, by_run in found.items():
            cells = [f"{VERDICTS[by_run[n]['verdict']]} {figure(by_run[n])}" if n in by_run else "–" for n in names]
            first = next(iter(by_run.values()))
            controls = "; ".join(dict.fromkeys(control(finding) for finding in by_run.values()))
            lines.append([statement, *cells, controls, first["rule"]])
        blocks += [f"### {heading}", markdown_table(lines)]
    return "\n\n".join(blocks) + "\n"


def scope(summary: Mapping[str, Any]) -> str:
    """What was looked at."""
    data, manifest = summary["data"], summary["manifest"]
    text = (
        f"{data['pairs']} object pairs ({4 * data['pairs']} pictures), {LIMITS[data['source']]}; "
        f"{data['calibration_pairs']} other pairs to calibrate with; seed {manifest['seed']}."
    )
    if data["stand_in_images"]:
        text += (
            " **The photographs were not there: panes of colour were drawn at their boxes. This is a rehearsal of the "
            "command; its figures say nothing of photographs.**"
        )
    if data["left_out"]:
        text += f" Left out: {'; '.join(data['left_out'])}."
    return f"{text} What holds here is about this model, not about larger ones."


def statements_table(experiments: Mapping[str, Any]) -> str:
    """All findings of a run."""
    lines = [["statement", "verdict", "figure [95 %]", "n", "control", "rule"]]
    for experiment in experiments.values():
        for finding in experiment["findings"]:
            cells = [finding["statement"], VERDICTS[finding["verdict"]], figure(finding)]
            lines.append([*cells, str(finding["estimate"]["n"]), control(finding), finding["rule"]])
    return markdown_table(lines) if len(lines) > 1 else "No experiment is complete."


def cost_table(experiments: Mapping[str, Any]) -> str:
    """Time and peak memory of every experiment."""
    lines = [["experiment", "rows", "seconds", "CPU seconds", "peak memory of the process so far, MiB"]]
    for experiment in experiments.values():
        cost = experiment["cost"]
        cells = [f"{cost[name]:.1f}" for name in ("seconds", "cpu_seconds")]
        lines.append([experiment["title"], str(experiment["rows"]), *cells, f"{cost['peak_process_mib']:.0f}"])
    return markdown_table(lines)


def format_table(table: Mapping[str, Any]) -> str:
    """A ``ReportTable`` as Markdown."""
    lines = [list(table["columns"]), *([shown(value) for value in row] for row in table["rows"])]
    body = markdown_table(lines) if table["rows"] else ""
    return "\n\n".join(filter(None, [f"{table['title']}:", body, table["note"]]))


def figure(finding: Mapping[str, Any]) -> str:
    """The figure of a finding with its interval and unit."""
    return f"{shown(finding['estimate'])} {finding['unit']}".rstrip()


def control(finding: Mapping[str, Any]) -> str:
    """The control of a finding."""
    figure_ = "" if finding["control"] is None else shown(finding["control"])
    return ": ".join(filter(None, [finding["control_name"], figure_]))


def shown(value: Any) -> str:
    """A cell: estimates with their interval, other numbers with three significant digits."""
    if isinstance(value, Estimate):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return f"{_number(value['value'])} [{_number(value['low'])}, {_number(value['high'])}]"
    return _number(value) if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first the heading, as a Markdown table."""
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def title(name: str) -> str:
    """An experiment's name as words."""
    return name.replace("_", " ")
