"""From what the harness logged about a benchmark to one score per item, after checking that nothing is missing."""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dualstream.eval.spatial_tasks import judge_orders

from .benchmarks import FAIR, PAPER, Benchmark

CIRCULAR = 1_000_000  # MMBench numbers the rotations of question i as i + k * 10^6
COSTS = ("visual_tokens", "kept_tokens", "prompt_tokens")


class IncompleteRunError(ValueError):
    """The harness came back without an answer to every sample, which it does not call an error itself."""


def check_complete(benchmark: Benchmark, samples: Sequence[Mapping[str, Any]], expected: int) -> None:
    """Check that every document was answered exactly once.

    Args:
        benchmark: which one.
        samples: what the harness logged.
        expected: documents that were to be answered.

    Raises:
        IncompleteRunError: a document is missing or there twice, or an answer is no answer.
    """
    ids = [sample["doc_id"] for sample in samples]
    missing = sorted(set(range(expected)) - set(ids))
    if len(ids) != expected or missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise IncompleteRunError(
            f"{benchmark.name}: {len(set(ids))} of {expected} samples are answered ({len(ids)} answers; missing: "
            f"{shown or 'none'})"
        )
    for sample in samples:
        answers = sample["filtered_resps"]
        if benchmark.by_likelihood:
            wanted = len(sample["doc"]["choices"])
            good = len(answers) == wanted and all(math.isfinite(float(loss)) for loss, _ in answers)
        else:
            good = len(answers) == 1 and isinstance(answers[0], str)
        if not good:
            raise IncompleteRunError(f"{benchmark.name}: sample {sample['doc_id']} has no usable answer: {answers!r}")


def score_items(benchmark: Benchmark, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per item: ``item``, ``cluster``, ``score`` (0 to 1) and for our tasks ``invalid`` and the sets.

    Items of one cluster (a picture, a pair, a set) are not independent.
    """
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    if benchmark.scorer in (FAIR, PAPER):
        return _own_items(benchmark, samples)
    if benchmark.scorer == "mmbench":
        return _circular_items(samples)
    rows = []
    for sample in samples:
        score = sample["pope_accuracy"]["score"] if benchmark.scorer == "pope" else sample["exact_match"]
        rows.append(
            {"item": str(sample["doc_id"]), "cluster": str(sample["doc"][benchmark.unit]), "score": float(score)}
        )
    return rows


def item_of(benchmark: Benchmark, sample: Mapping[str, Any]) -> str:
    """Name of the item that a document belongs to."""
    if benchmark.own:
        return str(sample["doc"]["item"])
    if benchmark.scorer == "mmbench":
        return str(int(sample["doc"]["index"]) % CIRCULAR)
    return str(sample["doc_id"])


def add_costs(
    benchmark: Benchmark,
    rows: list[dict[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Add to every item what its requests cost, on average: ``COSTS``.

    Args:
        benchmark: which one.
        rows: of ``score_items``; changed in place.
        samples: what the harness logged.
        records: what the model noted down, one or more per document.

    Raises:
        IncompleteRunError: a document has no record.
    """
    item = {sample["doc_id"]: item_of(benchmark, sample) for sample in samples}
    costs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if record["task"] == benchmark.name and record["doc_id"] in item:
            costs[item[record["doc_id"]]].append(record)
    unrecorded = sorted(set(item) - {r["doc_id"] for found in costs.values() for r in found})
    if unrecorded:
        raise IncompleteRunError(f"{benchmark.name}: no record of what samples {unrecorded[:5]} cost")
    for row in rows:
        found = costs[row["item"]]
        row.update({name: math.fsum(r[name] for r in found) / len(found) for name in COSTS})


def batch_seconds(benchmark: Benchmark, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds per request of every batch; all requests of a batch were noted with the same time."""
    return sorted({float(record["seconds"]) for record in records if record["task"] == benchmark.name})


def _own_items(benchmark: Benchmark, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    image = {sample["doc"]["item"]: str(sample["doc"]["image"]) for sample in samples}
    if benchmark.scorer == FAIR:
        verdicts = [
            (v.item, v.credit, v.invalid, v.pair_id, v.set_id, v.set_size)
            for v in judge_orders([sample["individual"] for sample in samples])
        ]
    else:
        names = ("item", "credit", "invalid", "pair_id", "set_id", "set_size")
        verdicts = [tuple(sample["individual"][name] for name in names) for sample in samples]
    if len(verdicts) != len(image):
        raise IncompleteRunError(f"{benchmark.name}: {len(verdicts)} of {len(image)} items have all their orders")
    return [
        {
            "item": item,
            "cluster": set_id or pair_id or image[item],
            "score": float(credit),
            "invalid": float(invalid),
            "pair_id": pair_id,
            "set_id": set_id,
            "set_size": set_size,
        }
        for item, credit, invalid, pair_id, set_id, set_size in verdicts
    ]


def _circular_items(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """MMBench counts a question when it is answered right in all its rotations; the harness's own judge reads it."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        groups[int(sample["doc"]["index"]) % CIRCULAR].append(dict(sample["gpt_eval_score"]))
    rows = []
    for index, group in groups.items():
        if all(int(row["index"]) >= CIRCULAR for row in group):
            continue  # cut off by a limit: the harness does not count rotations without their question either
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the categories of every question
            score = float(mmbench_evaluator.eval_result(group, "static")[0])
        rows.append({"item": str(index), "cluster": str(index), "score": score})
    return rows
