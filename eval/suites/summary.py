"""Figures of arms on the same items: accuracy, paired difference, retention, tokens saved, time, memory; all with n.

Resampling draws whole clusters (pictures, pairs, sets). The draws depend on the clusters alone, so an arm and the full
prompt are drawn alike and a difference or a ratio of them is paired.
"""

from __future__ import annotations

import functools
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from dualstream.eval.statistics import CONFIDENCE, Estimate, cluster_proportion, paired_difference, proportion

from .benchmarks import Benchmark, published

REFERENCE = "none"
RESAMPLES, CHUNK = 2000, 100
MEAN = "mean"
Rows = Sequence[dict[str, Any]]


def summarize(
    cells: dict[tuple[str, str, str], dict[str, Any]], benchmarks: Sequence[Benchmark]
) -> list[dict[str, Any]]:
    """Compare the arms of every model on every benchmark and on the mean of every group.

    Args:
        cells: (model, arm, task) -> what ``cells`` saved: ``items`` and ``kv_bytes_per_token``; ``none`` is among the
            arms, and all arms of a task have the same items.
        benchmarks: the tasks, in the order of the table.

    Returns:
        One object per model, group, task (``mean`` last) and arm. Estimates are objects of value, low, high and n; n
        counts clusters, of ``seconds`` (per request) batches. ``difference`` is that to ``none``,
        ``difference_to_matched`` of ``RULE@METHOD`` that to METHOD, which keeps as many tokens.

    Raises:
        ValueError: two arms answered different items.
    """
    models = list(dict.fromkeys(model for model, _, _ in cells))
    arms = list(dict.fromkeys(arm for _, arm, _ in cells))
    groups: dict[str, list[str]] = defaultdict(list)
    for benchmark in benchmarks:
        groups[benchmark.group].append(benchmark.name)
    rows = []
    for model in models:
        for group, tasks in groups.items():
            for task in tasks:
                _check_paired(model, task, {arm: cells[model, arm, task]["items"] for arm in arms})
            for name, parts in [*((task, [task]) for task in tasks), *([(MEAN, tasks)] if len(tasks) > 1 else [])]:
                by_arm = {arm: [cells[model, arm, task] for task in parts] for arm in arms}
                facts = {"model": model, "group": group, "task": name}
                rows += [facts | {"arm": arm} | _figures(arm, name, model, by_arm) for arm in arms]
    return rows


def _figures(arm: str, task: str, model: str, by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of an arm on one task, or on the mean over several tasks that count the same."""
    cells = by_arm[arm]
    items = [cell["items"] for cell in cells]
    clusters = [[row["cluster"] for row in rows] for rows in items]
    scores = {name: [_column(cell["items"], "score") for cell in found] for name, found in by_arm.items()}
    tokens = [_column(rows, "prompt_tokens") * c["kv_bytes_per_token"] for rows, c in zip(items, cells, strict=True)]
    kept = retention(scores[arm], scores[REFERENCE], clusters)
    matched = arm.partition("@")[2].partition(":")[0]
    row = {
        "items": sum(map(len, items)),
        "accuracy": accuracy(scores[arm], clusters).to_dict(),
        "difference": None if arm == REFERENCE else difference(scores[arm], scores[REFERENCE], clusters).to_dict(),
        "difference_to_matched": difference(scores[arm], scores[matched], clusters).to_dict()
        if matched in by_arm
        else None,
        "retention": kept.to_dict() if kept and arm != REFERENCE else None,
        "reduction_rate": mean([_reduction(rows) for rows in items], clusters).to_dict(),
        "seconds": median([seconds for cell in cells for seconds in cell["batch_seconds"]]).to_dict(),
        "kv_bytes": mean(tokens, clusters).to_dict(),
        "published": [vars(p) for p in published(model, task, arm)],
    }
    if all("invalid" in r for rows in items for r in rows):
        row["invalid"] = mean([_column(rows, "invalid") for rows in items], clusters).to_dict()
    if len(items) == 1:
        for name, size in (("pair", 2), ("set", None)):
            figure = _whole(items[0], f"{name}_id", size)
            if figure is not None:
                row[name] = figure.to_dict()
    return row


def accuracy(scores: list[np.ndarray], clusters: list[list[str]]) -> Estimate:
    """Mean score, of several tasks the mean of their means.

    Right-or-wrong scores of one task get Wilson's interval at the effective sample size, everything else the
    percentiles of a cluster bootstrap; where that collapses because all answers agree, Wilson's for as many clusters.
    """
    if len(scores) == 1 and np.isin(scores[0], (0, 1)).all():
        return cluster_proportion(scores[0], clusters[0])
    estimate = mean(scores, clusters)
    if estimate.low == estimate.high and estimate.value in (0, 1):
        wilson = proportion(np.full(estimate.n, estimate.value))
        return Estimate(estimate.value, wilson.low, wilson.high, estimate.n)
    return estimate


def difference(scores: list[np.ndarray], reference: list[np.ndarray], clusters: list[list[str]]) -> Estimate:
    """Paired difference of the (mean) scores; where no item differs, Agresti and Min's interval on the clusters."""
    estimate = mean([a - b for a, b in zip(scores, reference, strict=True)], clusters)
    if all(np.array_equal(a, b) for a, b in zip(scores, reference, strict=True)):
        same = np.ones(estimate.n, dtype=bool)
        return paired_difference(same, same)
    return estimate


def mean(values: list[np.ndarray], clusters: list[list[str]]) -> Estimate:
    """Mean over tasks of the mean over items, with a bootstrap interval over clusters, each task drawn by itself."""
    drawn = _drawn_means(values, clusters)
    low, high = _interval(drawn)
    value = float(np.mean([v.mean() for v in values]))
    return Estimate(value, low, high, sum(len(set(labels)) for labels in clusters))


def median(values: Sequence[float]) -> Estimate:
    """Median of independent measurements with a bootstrap interval; of a single one without."""
    column = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, column.size, size=(RESAMPLES, column.size))
    low, high = _interval(np.median(column[draws], axis=1))
    return Estimate(float(np.median(column)), low, high, int(column.size))


def retention(scores: list[np.ndarray], reference: list[np.ndarray], clusters: list[list[str]]) -> Estimate | None:
    """Accuracy as a share of the full prompt's; None where the full prompt has nothing right.

    Where no item differs the interval is that of ``difference``, as a share.
    """
    whole = float(np.mean([r.mean() for r in reference]))
    below, above = _drawn_means(reference, clusters), _drawn_means(scores, clusters)
    if whole == 0 or not (below > 0).any():
        return None
    gap = difference(scores, reference, clusters)
    low, high = _interval(above[below > 0] / below[below > 0])
    if low == high:
        low, high = 1 + gap.low / whole, 1 + gap.high / whole
    return Estimate(1 + gap.value / whole, low, high, gap.n)


def _drawn_means(values: list[np.ndarray], clusters: list[list[str]]) -> np.ndarray:
    """(RESAMPLES,) means over resampled clusters; of several tasks the mean of theirs."""
    drawn = np.zeros(RESAMPLES)
    for column, labels in zip(values, clusters, strict=True):
        codes, draws = _draws(tuple(labels))
        sums, sizes = np.bincount(codes, weights=column), np.bincount(codes)
        for start in range(0, RESAMPLES, CHUNK):
            weights = draws[start : start + CHUNK].astype(np.float64)
            drawn[start : start + CHUNK] += (weights @ sums) / (weights @ sizes) / len(values)
    return drawn


@functools.lru_cache(maxsize=16)
def _draws(labels: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Number of the cluster of every item, and (RESAMPLES, clusters) how often each cluster is drawn."""
    _, codes = np.unique(labels, return_inverse=True)
    count = int(codes.max()) + 1
    rng = np.random.default_rng(zlib.crc32("\n".join(labels).encode()))
    draws = np.empty((RESAMPLES, count), dtype=np.uint8)  # thousands of clusters fit; no cluster is drawn 256 times
    for start in range(0, RESAMPLES, CHUNK):
        draws[start : start + CHUNK] = rng.multinomial(count, np.full(count, 1 / count), size=CHUNK)
    return codes, draws


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def _whole(items: Rows, name: str, size: int | None) -> Estimate | None:
    """Share of complete pairs or sets with all items right; sets are the clusters."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in items:
        if row.get(name):
            groups[row[name]].append(row)
    whole = [rows for rows in groups.values() if len(rows) == (size or rows[0]["set_size"])]
    if not whole:
        return None
    scores = np.array([np.prod([row["score"] for row in rows]) for rows in whole])
    return accuracy([scores], [[rows[0]["cluster"] for rows in whole]])


def _reduction(rows: Rows) -> np.ndarray:
    """1 - kept / all visual tokens of every item; 0 where there is no picture."""
    visual = _column(rows, "visual_tokens")
    return np.where(visual > 0, 1 - _column(rows, "kept_tokens") / np.maximum(visual, 1), 0.0)


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _check_paired(model: str, task: str, items: dict[str, Rows]) -> None:
    names = [row["item"] for row in items[REFERENCE]]
    for arm, rows in items.items():
        if [row["item"] for row in rows] != names:
            raise ValueError(f"{model}, {task}: arms {REFERENCE} and {arm} did not answer the same items")
