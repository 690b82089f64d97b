"""What every experiment of the battery offers, and what it states."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dualstream.eval.statistics import Estimate

if TYPE_CHECKING:
    import pyarrow as pa

    from dualstream.analysis.resumable_rows import ResumableRows

    from .bench import Bench

# name -> "module:class" in this package; the order is that of the report.
EXPERIMENTS: dict[str, str] = {
    "position_geometry": "geometry.position_geometry:PositionGeometry",
    "relation_vectors": "relations.relation_vectors:RelationVectors",
    "vision_depth": "vision_depth:VisionDepth",
    "attention_axes": "rotary.attention_axes:AttentionAxes",
    "frequency_sensitivity": "rotary.frequency_sensitivity:FrequencySensitivity",
    "intervention": "edits.intervention:Intervention",
    "erase": "edits.erase:Erase",
    "position_ablations": "edits.position_ablations:PositionAblations",
}
# suite -> names of its experiments
SUITES: dict[str, tuple[str, ...]] = {
    "geometry": ("position_geometry",),
    "relations": ("relation_vectors",),
    "depth": ("vision_depth",),
    "axes": ("attention_axes", "frequency_sensitivity"),
    "intervention": ("intervention",),
    "erase": ("erase",),
    "ablations": ("position_ablations",),
}

YES, NO, OPEN = "yes", "no", "open"


@dataclass(frozen=True)
class Finding:
    """One statement, decided by a rule that was fixed before the figures were known.

    Attributes:
        statement: a sentence in the present tense that the figures can support or refuse.
        estimate: the figure it is decided by; its interval is clustered by object pair where pictures share one.
        verdict: ``yes``, ``no`` or ``open`` (the interval allows both).
        rule: when the verdict is ``yes``, when ``no``.
        control: the figure of the control, None where the rule compares with a constant.
        control_name: what the control is, or the constant.
        unit: of the estimate, e.g. ``cosine``, ``points``, ``R²``.
    """

    statement: str
    estimate: Estimate
    verdict: str
    rule: str
    control: Estimate | None = None
    control_name: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in (YES, NO, OPEN):
            raise ValueError(f"verdict={self.verdict!r}; accepted are {YES}, {NO}, {OPEN}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "statement": self.statement,
            "verdict": self.verdict,
            "estimate": self.estimate.to_dict(),
            "control": None if self.control is None else self.control.to_dict(),
            "control_name": self.control_name,
            "unit": self.unit,
            "rule": self.rule,
        }


@dataclass(frozen=True)
class ReportTable:
    """A table of the report.

    Attributes:
        title: one line above it.
        columns: their heads.
        rows: of cells; an ``Estimate`` is shown with its interval, a float with three digits.
        note: a sentence below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [[cell.to_dict() if isinstance(cell, Estimate) else cell for cell in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "note": self.note}


class Experiment(ABC):
    """One experiment. It holds its options only; all results are in the rows that it writes.

    Attributes:
        name: of its folder, its Parquet files and its row in ``EXPERIMENTS``.
        title: of its section in the report.
        question: what it asks, one or two sentences; the report prints it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        if options:
            raise ValueError(f"{self.name} has no options {', '.join(options)}.")

    def settings(self) -> dict[str, Any]:
        """What of the rows depends on this experiment's options, JSON-serialisable; beside the bench's settings."""
        return {}

    def reason_to_skip(self, bench: Bench) -> str | None:
        """Why the model or the data cannot be used, as a sentence; None if they can. No row is written then."""
        return None

    @abstractmethod
    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """Write what is missing. Units that are ``in rows`` are left alone; see ``pending``."""

    @abstractmethod
    def summarize(self, table: pa.Table) -> list[Finding]:
        """Statements from all rows (those of all units, sorted by unit)."""

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """Tables of the report from all rows."""
        return []

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """Draw figures from all rows, named ``<name>_*.png``; return their paths."""
        return []


def pending(units: Sequence[str], rows: ResumableRows, title: str) -> Iterator[str]:
    """The units without rows, in order, with a progress bar that counts the finished ones too."""
    from tqdm import tqdm

    done = rows.done
    left = [unit for unit in units if unit not in done]
    with tqdm(total=len(units), initial=len(units) - len(left), desc=title, unit="unit") as bar:
        for unit in left:
            yield unit
            bar.update()


def experiments_of(suite: str) -> list[str]:
    """Names of the experiments of a suite in the order of the report; ``all`` names every one.

    Raises:
        ValueError: the suite is unknown.
    """
    if suite == "all":
        return list(EXPERIMENTS)
    if suite not in SUITES:
        raise ValueError(f"suite={suite!r}; accepted are all, {', '.join(SUITES)}.")
    return [name for name in EXPERIMENTS if name in SUITES[suite]]


def make_experiment(name: str) -> Experiment:
    """Import and make an experiment."""
    module, _, attribute = EXPERIMENTS[name].partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)()


def above(estimate: Estimate, bound: float) -> str:
    """``yes`` if the whole interval lies above a bound, ``no`` if it lies below, else ``open``."""
    return YES if estimate.low > bound else NO if estimate.high < bound else OPEN


def below(estimate: Estimate, bound: float) -> str:
    """``yes`` if the whole interval lies below a bound, ``no`` if it lies above, else ``open``."""
    return YES if estimate.high < bound else NO if estimate.low > bound else OPEN
