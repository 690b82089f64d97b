"""Figures as they stand in cards: percentages with intervals, Markdown tables, entries of a card's ``model-index``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .scene_questions import CONTROL, FULL
from .statistics import Estimate

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "image-text-to-text"
SCENES = "dualstream scenes, {split} split"


def percent(estimate: dict[str, Any] | None, digits: int = 1, signed: bool = False) -> str:
    """Value and interval in percent, empty where there is none."""
    return "" if estimate is None else Estimate(**estimate).percent(digits, signed=signed)


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown."""
    rows = [list(head), ["---"] * len(head), *(list(row) for row in body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def kind_table(arms: Sequence[dict[str, Any]]) -> str:
    """Accuracy on every kind of scene question, beside that from another picture; ``arms`` of ``summarize``."""
    by_name = {row["arm"]: row["accuracy_by_kind"] for row in arms}
    control = by_name.get(CONTROL, {})
    return markdown_table(
        ("question", "n", "accuracy %", "control: another picture %"),
        [
            (kind, str(figure["n"]), percent(figure), percent(control.get(kind)))
            for kind, figure in by_name[FULL].items()
        ],
    )


def arm_table(arms: Sequence[dict[str, Any]]) -> str:
    """Accuracy of every way to prompt, the full prompt first; ``arms`` of ``summarize``."""
    rows = [
        (
            row["arm"] if row["arm"] == FULL else f"`{row['arm']}`",
            percent(row["accuracy"]),
            percent(row["difference_to_full"], signed=True),
            "0" if row["arm"] == FULL else percent(row["reduction_rate"]),
        )
        for row in sorted(arms, key=lambda row: row["arm"] != FULL)
        if row["arm"] != CONTROL
    ]
    return markdown_table(("prompt", "accuracy %", "difference to full, points", "fewer visual tokens %"), rows)


def cell_table(cells: dict[str, dict[str, Any]]) -> str:
    """How often an object's cell reads as a word of that object, by the place that is read."""
    return markdown_table(
        ("read at", "scenes", "readable object cells %", "control: another scene's objects %"),
        [
            (place, str(row["readable"]["n"]), percent(row["readable"]), percent(row["control"]))
            for place, row in cells.items()
        ],
    )


def metric(name: str, estimate: dict[str, Any], dataset: str, **details: Any) -> EvalResult:
    """One figure for ``model-index``, in percent, with its interval and n beside it.

    Args:
        name: what is measured, as a person reads it.
        estimate: of a share.
        dataset: name of what it was measured on.
        **details: ``dataset_type``, ``metric_type`` and the like of ``EvalResult``.
    """
    from huggingface_hub import EvalResult

    interval = {"n": estimate["n"], "low": _points(estimate["low"]), "high": _points(estimate["high"])}
    return EvalResult(
        **{
            "task_type": TASK,
            "dataset_type": "synthetic",
            "dataset_name": dataset,
            "metric_type": "accuracy",
            "metric_name": name,
            "metric_value": _points(estimate["value"]),
            "metric_args": {**interval, "unit": "percent", "confidence": 0.95},
            **details,
        }
    )


def arm_metrics(arms: Sequence[dict[str, Any]], split: str) -> list[EvalResult]:
    """Entries for ``model-index``: each kind of scene question from the full prompt, then all of them by arm."""
    dataset = SCENES.format(split=split)
    full = next(row for row in arms if row["arm"] == FULL)
    entries = [metric(f"{kind} accuracy", figure, dataset) for kind, figure in full["accuracy_by_kind"].items()]
    named = {row["arm"]: row for row in arms if row["arm"] != CONTROL}
    return entries + [metric(f"accuracy, {arm}", row["accuracy"], dataset) for arm, row in named.items()]


def _points(share: float) -> float:
    return round(100 * share, 1)
