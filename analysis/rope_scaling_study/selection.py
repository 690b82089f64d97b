"""Choose a scaling on validation pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .design import STOCK
from .runs import Unit

CRITERION = "mean individual accuracy over all conditions and forms of the validation pictures; ties: the lower nll"


def score(record: Mapping[str, Any]) -> tuple[float, float]:
    """What a measured scaling is ranked by: (accuracy, -nll), more is better.

    Raises:
        ValueError: it was not measured on validation pictures.
    """
    if record["split"] != "validation":
        raise ValueError(f"{record['arm']} was measured on {record['split']!r}; a scaling is chosen on 'validation'.")
    accuracy = np.mean([cell["individual"] for cell in record["cells"]])
    return round(float(accuracy), 9), -float(np.mean([cell["nll"] for cell in record["cells"]]))


def choose(records: Sequence[Mapping[str, Any]], kind: str | None = None) -> str:
    """The best scaling, of a type if one is given; the stock tower does not compete.

    Raises:
        ValueError: there is none, or one was not measured on validation pictures.
    """
    ranked = {record["arm"]: score(record) for record in records if record["arm"] != STOCK}
    if kind is not None:
        ranked = {arm: value for arm, value in ranked.items() if arm.partition(":")[0] == kind}
    if not ranked:
        raise ValueError(f"there is no scaling of type {kind or 'any'} to choose from.")
    return max(ranked, key=lambda arm: ranked[arm])


def read_records(units: Sequence[Unit], out: Path) -> list[dict[str, Any]]:
    """What the units of a grid measured."""
    return [json.loads(unit.path(out).read_text(encoding="utf-8")) for unit in units]
