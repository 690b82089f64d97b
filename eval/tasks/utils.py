"""What the YAML files here call. All of it lives in ``dualstream.eval.spatial_tasks``; this only hands it over."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from typing import Any

from datasets import Dataset

from dualstream.eval.spatial_tasks import (
    STYLE_VARIABLE,
    TASKS,
    MissingDataError,
    Verdict,
    judge_orders,
    judge_text,
    make_docs,
    open_image,
    scoring,
)

PAPER_METRICS = ("individual", "invalid", "tolerant", "constant", "pair", "set", "flip")
FAIR_METRICS = ("individual", "order_mean", "circular", "invalid", "chance", "pair", "set", "flip")
_FIGURES = {
    "individual": scoring.individual,
    "invalid": scoring.invalid,
    "constant": scoring.constant,
    "chance": scoring.chance,
    "pair": scoring.pair,
    "set": scoring.whole_set,
    "flip": scoring.flip,
    "tolerant": partial(scoring.extra, "tolerant"),
    "order_mean": partial(scoring.extra, "order_mean"),
    "circular": partial(scoring.extra, "circular"),
}


def docs(task: str, protocol: str, seed: Dataset) -> Dataset:
    """The task's documents in place of the seed row that the harness has loaded."""
    try:
        return Dataset.from_list(make_docs(task, protocol, style=os.environ.get(STYLE_VARIABLE, "qwen")))
    except (MissingDataError, ValueError) as error:
        # The harness tries five times, ten seconds in all, hides the message in a RetryError, and exits with 0.
        raise SystemExit(f"dualstream: {error}") from error


def pictures(doc: dict[str, Any]) -> list[Any]:
    """The one picture of a document."""
    return [open_image(doc["image"])]


def right_place(doc: dict[str, Any]) -> int:
    """Where the right option of a fair document stands."""
    return doc["shown"].index(doc["answer"])


def paper_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The verdict on a written answer, under every metric's name."""
    verdict = asdict(judge_text(doc, results[0]))
    return dict.fromkeys(PAPER_METRICS, verdict | {"text": results[0]})


def fair_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """The losses of the choices of one order, under every metric's name."""
    names = ("item", "order", "orders", "shown", "answer", "relations", "pair_id", "set_id", "set_size")
    losses, greedy = zip(*results, strict=True)
    row = {name: doc[name] for name in names} | {
        "losses": [float(x) for x in losses],
        "greedy": list(map(bool, greedy)),
    }
    return dict.fromkeys(FAIR_METRICS, row)


def paper_figure(name: str, rows: list[dict[str, Any]]) -> float:
    """A metric over the verdicts of a run."""
    return _FIGURES[name]([Verdict(**{k: v for k, v in row.items() if k != "text"}) for row in rows])


def fair_figure(name: str, rows: list[dict[str, Any]]) -> float:
    """A metric over the items of a run of which all orders were asked."""
    return _FIGURES[name](judge_orders(rows))


# The names that the YAML files use: <task>_<protocol> for documents, <protocol>_<metric> for figures.
for _task in TASKS:
    for _protocol in ("paper", "fair"):
        globals()[f"{_task}_{_protocol}"] = partial(docs, _task, _protocol)
for _metric in PAPER_METRICS:
    globals()[f"paper_{_metric}"] = partial(paper_figure, _metric)
for _metric in FAIR_METRICS:
    globals()[f"fair_{_metric}"] = partial(fair_figure, _metric)
