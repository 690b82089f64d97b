"""Tables, report and figures of an ablation run, all from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..experiment import write_report
from ..outcome_table import add_holm, against_baseline, baseline_of, paired_destruction
from ..tables import markdown_table, percent

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

COMPARISONS = (
    ("object", "translated"),
    ("object", "random-like-object"),
    ("object", "ig-like-object"),
    ("object", "attribution-like-object"),
    ("object+1", "translated+1"),
    ("object+1", "random-like-object+1"),
    ("object+1", "ig-like-object+1"),
    ("object+1", "object"),
)
MEANING = {
    "object": "tokens that the object covers; +k with k rings around them",
    "translated": "the same shape moved elsewhere in the picture, off the object",
    "random-like-object": "as many tokens as the object has, anywhere",
    "random-n": "n tokens anywhere",
    "outside": "all tokens but the object's",
    "all": "all visual tokens",
    "register-norm": "tokens whose norm at the language model's input is above mean + 2 standard deviations",
    "register-attention": "the same rule for the attention that the text behind the picture pays to a token",
    "ig": "best tokens by integrated gradients of the right answer's first token (absolute values, arXiv 2410.07149)",
    "attribution": "best tokens by attribution patching (signed)",
}


def summarize(table: pa.Table, seed: int = 0) -> dict[str, Any]:
    """All figures of a run.

    Returns:
        ``settings``: per setting ``baseline``, ``conditions`` and ``comparisons``; ``arms``: other replacements and
        depths; ``attribution``: how complete integrated gradients are.
    """
    frame = table.to_pandas()
    whole = frame[frame["method"] == "generate"]
    settings = {str(setting): _setting(rows, seed) for setting, rows in whole.groupby("setting", sort=False)}
    return {
        "settings": settings,
        "arms": _arms(frame[frame["method"] != "generate"], seed),
        "attribution": _attribution(whole),
    }


def _setting(rows: pd.DataFrame, seed: int) -> dict[str, Any]:
    base, baseline = baseline_of(rows[rows["condition"] == "none"])
    by_name = {str(name): own for name, own in rows.groupby("condition", sort=False)}
    conditions = []
    for name, own in by_name.items():
        if name == "none":
            continue
        sizes = own["n_tokens"].to_numpy(float)
        conditions.append(
            {
                "condition": name,
                "draws": int(own["draw"].nunique()),
                "tokens": float(sizes.mean()),
                "on_object": float(own["n_object"].sum() / max(sizes.sum(), 1)),
                **against_baseline(own, base, seed),
            }
        )
    add_holm(conditions, "test", "p_value")
    comparisons = []
    for treatment, control in COMPARISONS:
        if treatment in by_name and control in by_name:
            found = paired_destruction(by_name[treatment], by_name[control], base, seed)
            comparisons.append({"treatment": treatment, "control": control, "difference": found})
    add_holm(comparisons, "difference", "p_value")
    return {"baseline": baseline, "conditions": conditions, "comparisons": comparisons}


def _arms(rows: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    found = []
    for (setting, kind, depth), own in rows.groupby(["setting", "replacement", "depth"], sort=False):
        base, _ = baseline_of(own[own["condition"] == "none"])
        for name, part in own.groupby("condition", sort=False):
            if name != "none":
                arm = {"setting": setting, "replacement": kind, "depth": int(depth), "condition": name}
                found.append({**arm, **against_baseline(part, base, seed)})
    return found


def _attribution(rows: pd.DataFrame) -> dict[str, float] | None:
    own = rows[rows["condition"] == "ig-like-object"]
    own = own[own["setting"] != "generative"]
    if not len(own):
        return None
    relative = own["attribution_error"] / own["attribution_change"].abs().clip(lower=1e-6)
    return {
        "prompts": len(own),
        "median_change": float(own["attribution_change"].median()),
        "median_relative_error": float(relative.median()),
        "share_below_10_percent": float((relative < 0.1).mean()),
    }


def write_files(folder: Path, summary: dict[str, Any]) -> None:
    """Write the table of conditions as Parquet, the figures and the report, all from the summary."""
    from .ablate_figures import draw

    entries = [
        {"setting": setting, **entry}
        for setting, found in summary["settings"].items()
        for entry in found["conditions"]
    ]
    write_report(folder, entries, draw(summary, folder), format_report(summary))


def format_report(summary: dict[str, Any]) -> str:
    """The figures as Markdown, shares in percent with 95 % intervals."""
    lines = [
        f"# Which visual tokens carry the answer: {summary['model']}",
        f"{summary['data']} ({summary['split']}), seed {summary['seed']}. A condition replaces its tokens by the mean "
        "of the reference pictures before the language model reads them (with Qwen3-VL in deepstack features, too). "
        "*Destroyed* is the share of answers, right without ablation, that are wrong with it; intervals are 95 %, by "
        "image.",
    ]
    for setting, found in summary["settings"].items():
        lines += _setting_lines(setting, found)
    if summary["arms"]:
        lines += _arm_lines(summary["arms"])
    if summary["attribution"]:
        own = summary["attribution"]
        lines.append(
            f"Integrated gradients, {own['prompts']} prompts: the attributions miss y(x) - y(x') by "
            f"{100 * own['median_relative_error']:.1f} % (median; {100 * own['share_below_10_percent']:.0f} % of "
            "prompts by less than a tenth)."
        )
    lines.append("Conditions:\n\n" + "\n".join(f"- `{name}`: {meaning}." for name, meaning in MEANING.items()))
    steps = "; ".join(f"{step['step']}: {step['left']} left" for step in summary["funnel"])
    lines.append(f"Selection of pictures: {steps}.")
    return "\n\n".join(lines)


def _setting_lines(setting: str, found: dict[str, Any]) -> list[str]:
    rows = [["condition", "tokens", "images", "destroyed %", "accuracy %", "p(answer)", "margin change, nats", "p"]]
    for entry in found["conditions"]:
        rows.append(
            [
                entry["condition"],
                f"{entry['tokens']:.1f}",
                str(entry["images"]),
                "–" if entry["destroyed"] is None else percent(entry["destroyed"]),
                percent(entry["accuracy"]),
                "–" if entry["probability"] is None else f"{entry['probability']['value']:.2f}",
                "–" if entry["margin_change"] is None else nats(entry["margin_change"]),
                p_text(entry["test"]["p_holm"]),
            ]
        )
    pairs = [["condition", "control", "destroys more by, points", "images", "p"]]
    for entry in found["comparisons"]:
        own = entry["difference"]
        cells = ["–", "0", "–"] if own is None else [percent(own, signed=True), str(own["n"]), p_text(own["p_holm"])]
        pairs.append([entry["treatment"], entry["control"], *cells])
    right = found["baseline"]["accuracy"]
    return [
        f"## {setting}",
        f"Without ablation {percent(right)} % of {right['n']} answers are right. p: McNemar's exact test against no "
        "ablation, Holm-corrected over the table.",
        markdown_table(rows),
        "Against matched controls, on the images answered rightly without ablation; sign-flip test, Holm-corrected:",
        markdown_table(pairs),
    ]


def _arm_lines(arms: list[dict[str, Any]]) -> list[str]:
    conditions = list(dict.fromkeys(arm["condition"] for arm in arms))
    rows = [["setting", "replacement", "depth", *(f"{name}, destroyed %" for name in conditions)]]
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for arm in arms:
        groups.setdefault((arm["setting"], arm["replacement"], arm["depth"]), {})[arm["condition"]] = arm
    for (setting, kind, depth), own in groups.items():
        place = "connector" if depth < 0 else str(depth)
        cells = [percent(own[name]["destroyed"]) if own.get(name, {}).get("destroyed") else "–" for name in conditions]
        rows.append([setting, kind, place, *cells])
    n = arms[0]["destroyed"]["n"] if arms[0]["destroyed"] else arms[0]["images"]
    return [
        "## Other replacements, other depths",
        f"The first {arms[0]['images']} pictures ({n} right without ablation in the first row), judged by the "
        "answer's first token. Depth k: the residual stream after k blocks is replaced by values of the same depth.",
        markdown_table(rows),
    ]


def nats(estimate: dict[str, float]) -> str:
    """A figure in nats with its interval."""
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


def p_text(value: float) -> str:
    """A p-value, small ones by their bound."""
    return "<0.001" if value < 0.001 else f"{np.clip(value, 0, 1):.3f}"
