"""Choose a scaling on validation pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .design import STOCK
from .runs import Unit

CRITERION = (
    "mean individual accuracy over all conditions and forms of the validation pictures; of equals the one that "
    "changes the frequencies most"
)


def score(record: Mapping[str, Any]) -> dict[str, float]:
    """Mean ``accuracy`` and ``nll`` of a measured scaling over conditions and forms.

    Raises:
        ValueError: it was not measured on validation pictures.
    """
    if record["split"] != "validation":
        raise ValueError(f"{record['arm']} was measured on {record['split']!r}; a scaling is chosen on 'validation'.")
    accuracy, nll = (float(np.mean([cell[name] for cell in record["cells"]])) for name in ("individual", "nll"))
    return {"accuracy": round(accuracy, 9), "nll": nll}


def log_factors(text: str) -> torch.Tensor:
    """The logarithms of a scaling's factors from the highest to the lowest frequency, (100) float64."""
    from dualstream.modeling import RopeScaling

    return RopeScaling.from_any(text).factors(torch.linspace(0, 0.99, 100)).log()[0, 0]


def raises(text: str) -> bool:
    """Whether a scaling raises frequencies and lowers none, as the method means it."""
    return bool((log_factors(text) >= 0).all())


def choose(records: Sequence[Mapping[str, Any]], kind: str | None = None, raising: bool = True) -> str:
    """The best scaling; the stock tower does not compete.

    Args:
        records: what was measured.
        kind: only scalings of this type.
        raising: only scalings that raise frequencies; False: only others.

    Raises:
        ValueError: there is none, or one was not measured on validation pictures.
    """
    accuracies = {record["arm"]: score(record)["accuracy"] for record in records if record["arm"] != STOCK}
    ranked = {
        arm: (accuracy, float(log_factors(arm).norm()))
        for arm, accuracy in accuracies.items()
        if kind in (None, arm.partition(":")[0]) and raises(arm) == raising
    }
    if not ranked:
        what = f"of type {kind or 'any'} that {'raises' if raising else 'lowers'} frequencies"
        raise ValueError(f"there is no scaling {what} to choose from.")
    return max(ranked, key=lambda arm: ranked[arm])


def read_records(units: Sequence[Unit], out: Path) -> list[dict[str, Any]]:
    """What the units of a grid measured."""
    return [json.loads(unit.path(out).read_text(encoding="utf-8")) for unit in units]
