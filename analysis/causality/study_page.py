"""One page over the runs on the embedded models: ``python -m dualstream.analysis.causality.study_page FOLDER``.

The folder holds ``lens-MODEL``, ``ablate-MODEL``, ``knockout-MODEL`` and ``replicate-MODEL``, as the commands wrote
them; every figure on the page is read from their summaries. Runs that are missing are named.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dualstream.eval.significance import images_needed, smallest_loss_found

from .replication.replicate_summary import PUBLISHED_ABLATION
from .settings import SETTINGS
from .tables import markdown_table, percent

KINDS = ("lens", "ablate", "knockout", "replicate")
PAGE, ACCEPTANCE = "report.md", "acceptance.md"
ROUTES = (
    "object+1->last",
    "translated+1->last",
    "object+1->question",
    "translated+1->question",
    "question->last",
    "random-like-question->last",
    "object+1->question,last",
    "visual->last",
    "visual->question,last",
    "object+1->last-row",
    "visual->last-row",
)
Runs = dict[str, dict[str, dict[str, Any]]]


def read_runs(folder: Path, name: str = "summary.json") -> Runs:
    """Kind -> model -> content of a file of the run."""
    found: Runs = {kind: {} for kind in KINDS}
    for path in sorted(folder.glob(f"*-*/{name}")):
        kind, _, model = path.parent.name.partition("-")
        if kind in found:
            found[kind][model] = json.loads(path.read_text(encoding="utf-8"))
    return found


def format_page(runs: Runs, costs: Runs, acceptance: str) -> str:
    """The page as Markdown."""
    models = sorted({model for own in runs.values() for model in own})
    missing = [f"{kind} of {model}" for kind in KINDS for model in models if model not in runs[kind]]
    blocks = [
        "# Which visual tokens carry the answer, on the embedded models",
        "The three experiments of arXiv 2410.07149 (token ablation, logit lens, attention knockout) on held-out "
        "scenes, with exact geometry, matched controls and 95 % intervals. The models are tiny and know one small "
        "world; their recipe trains every cell to read as what it shows, so the lens figures say that the instrument "
        "works and nothing about large models. Ablation and knockout were not trained for.",
        *([f"Not run: {', '.join(missing)}."] if missing else []),
        _in_short(runs),
        "## Lens: cells of an object that read as its class, %",
        _lens(runs["lens"]),
        _pictures("lens", runs["lens"], "lens.png"),
        "*Cross-fitted*: the depth is chosen on other pictures. Controls are read at their own best depth, chosen the "
        "same way. Shuffled labels and wrong images hit by chance: there are eight classes.",
        "## Ablation: right answers destroyed, %",
        _ablation(runs["ablate"]),
        "Tokens are replaced by the mean of validation pictures before the language model reads them. `translated`: "
        "the same shape elsewhere in the picture; `random-like-object`: as many tokens anywhere; +1: with one ring.",
        "## Knockout: right answers kept in VQA, all layers cut, %",
        _knockout(runs["knockout"]),
        _pictures("knockout", runs["knockout"], "routes-vqa.png"),
        "All windows of layers are in the reports of the runs. An asterisk: p < 0.05, McNemar's exact test against no "
        "cut, Holm-corrected over the whole table.",
        "## The public code's choices against the mended ones, right answers destroyed, %",
        _replication(runs["replicate"]),
        "Published: LLaVA-1.5 7B on COCO, as public replications quote it. The full tables (36 knockout cells, lens, "
        "defects D1 to D19, selection) are in the reports of the runs.",
        "## What these numbers of pictures can find",
        _power(runs),
        "## Cost",
        _costs(costs),
        "## Reports of the runs",
        "\n".join(f"- [{kind}, {model}]({kind}-{model}/report.md)" for kind in KINDS for model in sorted(runs[kind])),
        "## Acceptance tests",
        acceptance.strip(),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _in_short(runs: Runs) -> str:
    """Ranges over models and settings, from the tables below."""
    lines = []
    if runs["lens"]:
        own, best = ([run["whole"][kind]["best_depth"]["cross_fitted"] for run in runs["lens"].values()]
                     for kind in ("object", "shuffled labels"))  # fmt: skip
        lines.append(
            f"cells of an object read as its class in {_range(own)} %, under shuffled labels {_range(best)} %"
        )
    if runs["ablate"]:
        found = {name: _all_destroyed(runs["ablate"], name) for name in ("object", "translated")}
        lines.append(
            f"replacing the object's tokens destroys {_range(found['object'])} % of the right answers, replacing the "
            f"same shape elsewhere {_range(found['translated'])} %"
        )
    for route, words in (
        ("object+1->last", "without the way from the object to the last position"),
        ("object+1->question", "without the way from the object to the question"),
        ("visual->last-row", "without any visual token reaching the last visual row"),
    ):
        cells = [cell for run in runs["knockout"].values() if (cell := _cell(run, route)) and cell["destroyed"]]
        kept = [{"value": 1 - cell["destroyed"]["value"]} for cell in cells]
        if kept:
            lines.append(f"{words} {_range(kept)} % of the right answers stay right")
    return "In short: " + "; ".join(lines) + "." if lines else ""


def _all_destroyed(runs: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = [e for run in runs.values() for part in run["settings"].values() for e in part["conditions"]]
    return [entry["destroyed"] for entry in entries if entry["condition"] == name and entry["destroyed"]]


def _range(estimates: list[dict[str, Any]]) -> str:
    values = sorted({f"{100 * each['value']:.1f}" for each in estimates}, key=float)
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _pictures(kind: str, runs: dict[str, Any], name: str) -> str:
    return "\n\n".join(f"![{kind} of {model}]({kind}-{model}/{name})" for model in sorted(runs))


def _lens(runs: dict[str, Any]) -> str:
    kinds = ("object", "outside", "moved", "shuffled labels", "wrong image")
    rows = [["model", "pictures", "", *kinds]]
    for model, run in sorted(runs.items()):
        whole = run["whole"]
        for title, part, value in (
            ("one depth, cross-fitted", "best_depth", "cross_fitted"),
            ("one depth, in-sample", "best_depth", "in_sample"),
            ("per picture, in-sample (published rule)", "best_depth_per_image", "in_sample"),
            ("per picture, cross-fitted", "best_depth_per_image", "cross_fitted"),
        ):
            found = [whole[kind][part][value] if whole[kind] else None for kind in kinds]
            cells = [percent(each) if each else "–" for each in found]
            rows.append([model, str(run["accounting"]["pictures"]), title, *cells])
    return markdown_table(rows)


def _ablation(runs: dict[str, Any]) -> str:
    names = ("object", "translated", "random-like-object", "object+1", "translated+1", "random-like-object+1", "all")
    rows = [["model", "setting", "right", *names, "object − translated"]]
    for model, run in sorted(runs.items()):
        for setting, found in run["settings"].items():
            own = {entry["condition"]: entry for entry in found["conditions"]}
            pairs = {(entry["treatment"], entry["control"]): entry["difference"] for entry in found["comparisons"]}
            pair = pairs.get(("object", "translated"))
            shares = [own[name]["destroyed"] if name in own else None for name in names]
            right = own["object"]["destroyed"]["n"] if own.get("object", {}).get("destroyed") else 0
            cells = [percent(each) if each else "–" for each in shares]
            rows.append([model, setting, str(right), *cells, percent(pair, signed=True) if pair else "–"])
    return markdown_table(rows)


def _knockout(runs: dict[str, Any]) -> str:
    models = sorted(runs)
    rows = [["route", *models]]
    for route in ROUTES:
        cells = []
        for model in models:
            cells.append(_kept(_cell(runs[model], route)))
        rows.append([route, *cells])
    return markdown_table(rows)


def _cell(run: dict[str, Any], route: str) -> dict[str, Any] | None:
    found = run["settings"].get("vqa", {"cells": []})["cells"]
    return next((c for c in found if (c["route"], c["window"], c["head"]) == (route, "all", -1)), None)


def _kept(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["destroyed"] is None:
        return "–"
    lost = cell["destroyed"]
    kept = {"value": 1 - lost["value"], "low": 1 - lost["high"], "high": 1 - lost["low"]}
    return f"{percent(kept)}{'*' if cell['test']['p_holm'] < 0.05 else ''}, n {lost['n']}"


def _replication(runs: dict[str, Any]) -> str:
    rows = [["model", "setting", "tokens", "published", "compatible", "corrected", "moved control"]]
    for model, run in sorted(runs.items()):
        tables = {
            name: {(row["setting"], row["condition"]): row["destroyed"] for row in run["ablation"][name]}
            for name in ("compatible", "corrected")
        }
        for setting in SETTINGS:
            for condition, control in (("object", "moved"), ("object+1", "moved+1")):
                found = [tables["compatible"].get((setting, condition)), tables["corrected"].get((setting, condition))]
                found.append(tables["corrected"].get((setting, control)))
                cells = [f"{percent(each)}, n {each['n']}" if each else "no right baseline" for each in found]
                rows.append([model, setting, condition, f"{PUBLISHED_ABLATION[setting, condition]:g}", *cells])
    return markdown_table(rows)


def _power(runs: Runs) -> str:
    sizes = {
        f"{kind} of {model}": max(_right(kind, run), default=0)
        for kind in ("ablate", "knockout", "replicate")
        for model, run in sorted(runs[kind].items())
    }
    rows = [["run", "right answers, at most", "smallest loss found, points", "after Holm over 36 cells"]]
    for name, n in sizes.items():
        if n:
            rows.append([name, str(n), *(f"{100 * smallest_loss_found(n, level=a):.1f}" for a in (0.05, 0.05 / 36))])
    return (
        markdown_table(rows)
        + "\n\nLoss that McNemar's exact test finds with 80 % power if no answer is gained. To find a loss of 10 "
        f"points with 2 gained takes {images_needed(0.1, 0.02)} pictures, over 36 cells "
        f"{images_needed(0.1, 0.02, level=0.05 / 36)}; the published tables fit 39 to 90."
    )


def _right(kind: str, run: dict[str, Any]) -> list[int]:
    if kind == "replicate":
        found = [row["destroyed"] for rows in run["ablation"].values() for row in rows]
    else:
        parts = run["settings"].values()
        found = [row["destroyed"] for part in parts for row in part["conditions" if kind == "ablate" else "cells"]]
    return [each["n"] for each in found if each]


def _costs(costs: Runs) -> str:
    rows = [["run", "pictures", "processor seconds", "clock seconds", "largest memory, MiB"]]
    for kind in KINDS:
        for model, manifest in sorted(costs[kind].items()):
            cost = manifest.get("cost") or {}
            known = [cost.get(name) for name in ("pictures", "cpu_seconds", "wall_seconds", "peak_memory_mib")]
            rows.append([f"{kind} of {model}", *("–" if each is None else f"{each:.0f}" for each in known)])
    return (
        markdown_table(rows)
        + "\n\nOne thread each, for the rows alone, on a machine that many runs shared: clock times say little."
    )


def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the folders of the runs and the table of acceptance tests")
    folder = parser.parse_args(argv).folder
    acceptance = folder / ACCEPTANCE
    text = acceptance.read_text(encoding="utf-8") if acceptance.is_file() else ""
    page = format_page(read_runs(folder), read_runs(folder, "manifest.json"), text)
    (folder / PAGE).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
