"""From the rows of a replication to its tables: published, compatible and corrected side by side."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dualstream.eval.significance import holm, mcnemar_exact, sign_flip_test
from dualstream.eval.statistics import cluster_proportion, proportion

from ..knockouts.routes import PAPER_ROUTES
from ..lenses.lens_shares import best_depth, share_estimate
from ..settings import SETTINGS
from .protocols import PROTOCOLS

# Figures of arXiv 2410.07149 for LLaVA-1.5 7B as public replications quote them, in percent of baseline-correct
# answers destroyed; its tables were not at hand. They are about another model and other pictures.
PUBLISHED_ABLATION = {
    ("generative", "object"): 33.33,
    ("polling", "object"): 15.38,
    ("vqa", "object"): 33.33,
    ("generative", "object+1"): 71.79,
    ("polling", "object+1"): 51.28,
    ("vqa", "object+1"): 86.67,
    ("generative", "random-40"): 2.4,
    ("polling", "random-40"): 0.0,
    ("vqa", "random-40"): 0.0,
}
# Share of baseline-correct answers that stay right.
PUBLISHED_KNOCKOUT = {("object+1->last", "mid-late"): 0.82, ("object+1->last", "all"): 0.67} | {
    (route, window): 1.0
    for route in ("object+1->last-row", "visual->last-row")
    for window in ("early", "early-mid", "mid", "mid-late", "late", "all")
}
PUBLISHED_LENS = {"share": 0.237, "depth": 25.7, "entries": 33}
MATCHED = {"object": "moved", "object+1": "moved+1"}


def summarize(table: pa.Table) -> dict[str, Any]:
    """All tables of a replication.

    Args:
        table: rows of ``replicate_picture``.

    Returns:
        ``selection`` (pictures per protocol and what removed them), ``geometry`` (compatible against exact token
        sets), ``ablation``, ``knockout``, ``lens`` and ``scorers`` (verdicts that differ on the same text).
    """
    frame = table.to_pandas()
    return {
        "pictures": int(frame["image"].nunique()),
        "selection": _selection(frame),
        "geometry": _geometry(frame),
        "ablation": {name: _ablation(frame[frame["protocol"] == name]) for name in PROTOCOLS},
        "knockout": {name: _knockout(frame[frame["protocol"] == name]) for name in PROTOCOLS},
        "lens": {name: _lens(frame[frame["protocol"] == name]) for name in PROTOCOLS},
        "scorers": _scorers(frame),
    }


def _selection(frame: pd.DataFrame) -> dict[str, dict[str, dict[str, int]]]:
    """Protocol -> setting -> what happened -> pictures; rules that end before a setting count for all of them."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name in PROTOCOLS:
        own = frame[(frame["protocol"] == name) & (frame["experiment"] == "selection")]
        early = Counter(own.loc[own["setting"] == "", "condition"])
        found[name] = {
            setting: dict(early + Counter(own.loc[own["setting"] == setting, "condition"]))
            for setting in ("description", "vqa")
        }
    return found


def _geometry(frame: pd.DataFrame) -> dict[str, Any] | None:
    """How the public geometry's object sets compare with the exact ones, over pictures that both protocols took."""
    own = frame[(frame["experiment"] == "selection") & (frame["setting"] == "description")]
    sets = own.pivot(index="image", columns="protocol", values="tokens").dropna()
    if sets.empty or len(sets.columns) < len(PROTOCOLS):
        return None
    pairs = [(set(row.compatible), set(row.corrected)) for row in sets.itertuples()]
    return {
        "recall": share_estimate(np.array([len(a & b) / len(b) for a, b in pairs])),
        "jaccard": share_estimate(np.array([len(a & b) / len(a | b) for a, b in pairs])),
        "equal": proportion(np.array([a == b for a, b in pairs])).to_dict(),
        "mean_tokens": {
            "compatible": float(np.mean([len(a) for a, _ in pairs])),
            "corrected": float(np.mean([len(b) for _, b in pairs])),
        },
    }


def _ablation(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Share of baseline-correct answers destroyed, per setting and condition, with the published figure."""
    own = frame[frame["experiment"] == "ablation"]
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        part = own[own["setting"] == setting]
        plain = part[part["condition"] == "none"].set_index("image")["correct"]
        right = set(plain[plain].index)
        for condition in part["condition"].drop_duplicates():
            cells = part[(part["condition"] == condition) & part["image"].isin(right)]
            everything = part[part["condition"] == condition]
            row: dict[str, Any] = {
                "setting": setting,
                "condition": condition,
                "published": PUBLISHED_ABLATION.get((setting, condition)),
                "destroyed": None,
                "mean_tokens": float(everything["tokens"].map(len).mean()),
                "accuracy_over_all": float(everything["correct"].mean()),
            }
            if len(cells):
                lost = ~cells["correct"].to_numpy(dtype=bool)
                row["destroyed"] = cluster_proportion(lost, cells["image"].to_numpy()).to_dict()
            rows.append(row | _against_control(part, condition, right))
    tested = [row for row in rows if row["p_value"] is not None]
    for row, adjusted in zip(tested, holm([row["p_value"] for row in tested]) if tested else [], strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _against_control(part: pd.DataFrame, condition: str, right: set[str]) -> dict[str, Any]:
    """Paired test of a condition against its moved copies, mean over their draws."""
    control = MATCHED.get(condition)
    moved = part[(part["condition"] == control) & part["image"].isin(right)] if control else part.iloc[:0]
    if moved.empty:
        return {"control": None, "p_value": None, "p_holm": None}
    kept = moved.groupby("image")["correct"].mean()
    own = part[part["condition"] == condition].set_index("image").loc[kept.index, "correct"].astype(float)
    return {"control": control, "p_value": sign_flip_test(own.to_numpy() - kept.to_numpy()), "p_holm": None}


def _knockout(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Share of baseline-correct answers that stay right per route and window; Holm over the whole table."""
    own = frame[frame["experiment"] == "knockout"]
    plain = own[own["condition"] == "none"].set_index("image")["correct"]
    right = plain[plain].index
    rows = []
    for route in PAPER_ROUTES:
        for window in own.loc[own["condition"] == route, "window"].drop_duplicates():
            cells = own[(own["condition"] == route) & (own["window"] == window) & own["image"].isin(right)]
            kept = cells["correct"].to_numpy(dtype=bool)
            if not len(kept):
                continue
            rows.append(
                {
                    "route": route,
                    "window": window,
                    "published": PUBLISHED_KNOCKOUT.get((route, window)),
                    "kept": proportion(kept).to_dict(),
                    "p_value": mcnemar_exact(kept, np.ones_like(kept)).p_value,
                }
            )
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]) if rows else [], strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _lens(frame: pd.DataFrame) -> dict[str, Any] | None:
    """The best depth per picture, in-sample as published, and one depth for all, cross-fitted."""
    own = frame[frame["experiment"] == "lens"]
    if own.empty:
        return None
    shares = own.pivot(index="image", columns="depth", values="share").sort_index(axis=1)
    values = shares.to_numpy(dtype=float)
    hit = values.max(1) > 0
    return {
        "by_depth": [share_estimate(column) for column in values.T],
        "per_picture_maximum": share_estimate(values.max(1)),
        "mean_depth": float(values[hit].argmax(1).mean()) if hit.any() else None,
        "without_hit": int((~hit).sum()),
        "one_depth": best_depth(values, shares.index.to_list()),
        "entries": int(values.shape[1]),
    }


def _scorers(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Verdicts of the two scorers on the same texts, ablated ones included."""
    rows = []
    for setting in SETTINGS:
        own = frame[(frame["experiment"] == "ablation") & (frame["setting"] == setting)]
        if own.empty:
            continue
        compatible = np.where(own["protocol"] == "compatible", own["correct"], own["other_scorer"]).astype(bool)
        corrected = np.where(own["protocol"] == "compatible", own["other_scorer"], own["correct"]).astype(bool)
        rows.append(
            {
                "setting": setting,
                "texts": len(own),
                "only_compatible": int((compatible & ~corrected).sum()),
                "only_corrected": int((corrected & ~compatible).sum()),
                "differ": cluster_proportion(compatible != corrected, own["image"].to_numpy()).to_dict(),
            }
        )
    return rows
