"""How much of the vision tower the answers need: accuracy by depth, where the tower is cut, with and without a lens.

A connector was trained on the tower's last states. Cut the tower, and what it reads is both less computed and of a
form it has never seen. A *lens*, a linear map from the states of a depth to the last ones, fitted on pictures that are
not reported on, takes the second away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from dualstream.analysis.figure_style import CONTROL, PALETTE, curve, figure, save
from dualstream.analysis.interventions import encoded_images
from dualstream.eval.statistics import Estimate, cluster_proportion, clustered_mean

from .axis_questions import axis_question, opposite, score_questions
from .experiment import Experiment, Finding, ReportTable, above, pending
from .vision_states import Lens, chosen_depths, feature_depth, truncated_vision, watched_vision

if TYPE_CHECKING:
    from dualstream.analysis.resumable_rows import ResumableRows

    from .bench import Bench

PLAIN, TUNED = "as it is", "with a lens"
SPATIAL, PRESENCE = "spatial", "presence"
RIDGE = 1e-3  # of the mean squared state
STEP = 0.25  # what one picture changes in a pair's figure
DEPTHS = 9  # at most
PAIRS = 24  # at most; every depth is asked about each of their pictures


class VisionDepth(Experiment):
    """Accuracy by depth of the vision tower."""

    name = "vision_depth"
    title = "Answers by depth of the vision tower"
    question = (
        "After how many blocks of the vision tower can the language model say which of two opposite relations holds, "
        "and, as a control without a place, whether an object is there? Chance is 0.5 for both."
    )

    def settings(self) -> dict[str, Any]:
        """See ``Experiment``."""
        return {"pairs": PAIRS, "depths": DEPTHS, "ridge": RIDGE}

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """See ``Experiment``; a unit is a depth, with or without the lens."""
        last = feature_depth(bench.model)
        depths = chosen_depths(last, DEPTHS)
        units = [
            f"{lens} {depth:03d}" for lens in (PLAIN, TUNED) for depth in depths if (lens, depth) != (TUNED, last)
        ]
        layers = getattr(bench.model.config, "vision_feature_layer", -1)
        if not isinstance(layers, int):  # several depths are read side by side; no one lens leads to them
            units = [unit for unit in units if unit.startswith(PLAIN)]
        lenses: dict[int, Lens] = {}
        for unit in pending(units, rows, self.title):
            kind, _, number = unit.rpartition(" ")
            depth = int(number)
            if kind == TUNED and not lenses:
                lenses = fit_lenses(bench, depths, last)
            rows.write(unit, list(answers(bench, depth, kind, lenses[depth] if kind == TUNED else None)))

    def summarize(self, table: pa.Table) -> list[Finding]:
        """See ``Experiment``."""
        rows = table.to_pylist()
        depths = sorted({row["depth"] for row in rows})
        last, middle = depths[-1], depths[len(depths) // 2]
        full = accuracy(rows, SPATIAL, PLAIN, last)
        findings = [
            Finding(
                "The model tells a relation from its opposite.",
                full,
                above(full, 0.5),
                "yes: interval above 0.50; no: below it",
                accuracy(rows, PRESENCE, PLAIN, last),
                "presence question",
                "accuracy",
            )
        ]
        cuts = ((0, PLAIN, "its patch embeddings alone"), (middle, PLAIN, f"its first {middle} blocks"))
        for depth, kind, words in (*cuts, (middle, TUNED, f"its first {middle} blocks and a lens")):
            if not chosen(rows, SPATIAL, kind, depth):
                continue
            found = accuracy(rows, SPATIAL, kind, depth)
            findings.append(
                Finding(
                    f"With {words} instead of the whole tower, it still tells a relation from its opposite.",
                    found,
                    above(found, 0.5),
                    "yes: interval above 0.50; no: below it",
                    accuracy(rows, PRESENCE, kind, depth),
                    "presence question",
                    "accuracy",
                )
            )
        gain = difference(rows, SPATIAL, (PLAIN, last), (PLAIN, middle))
        findings.append(
            Finding(
                f"The blocks behind block {middle} add to where-answers.",
                gain,
                above(gain, 0),
                "yes: interval of the paired difference above 0; no: below it",
                difference(rows, PRESENCE, (PLAIN, last), (PLAIN, middle)),
                "the same for presence",
                "accuracy",
            )
        )
        if chosen(rows, SPATIAL, TUNED, middle):
            gain = difference(rows, SPATIAL, (TUNED, middle), (PLAIN, middle))
            findings.append(
                Finding(
                    f"Part of what a tower of {middle} blocks loses is form that a linear lens gives back.",
                    gain,
                    above(gain, 0),
                    "yes: interval of the paired difference above 0; no: below it",
                    difference(rows, PRESENCE, (TUNED, middle), (PLAIN, middle)),
                    "the same for presence",
                    "accuracy",
                )
            )
        return findings

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """See ``Experiment``."""
        rows = table.to_pylist()
        shown = ReportTable(
            "Accuracy by depth of the vision tower",
            (
                "blocks",
                "tower",
                "right against opposite",
                "both pictures of an axis",
                "best of four",
                "presence",
            ),
            note="Chance: 0.5, 0.25, 0.25, 0.5. The question names two opposite relations; best of four scores all.",
        )
        for depth, kind in sorted({(row["depth"], row["lens"]) for row in rows}):
            cells = [accuracy(rows, SPATIAL, kind, depth), both_right(rows, kind, depth)]
            cells += [accuracy(rows, SPATIAL, kind, depth, "best"), accuracy(rows, PRESENCE, kind, depth)]
            shown.rows.append((depth, kind, *cells))
        return [shown]

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """See ``Experiment``."""
        rows = table.to_pylist()
        names = {SPATIAL: "Right against opposite relation", PRESENCE: "Presence of an object (control)"}
        with figure(1, 2, (9, 3.2)) as (fig, axes):
            for panel, (question, heading) in zip(axes[0], names.items(), strict=True):
                for color, kind in zip(PALETTE, (PLAIN, TUNED), strict=False):
                    depths = sorted({row["depth"] for row in rows if row["lens"] == kind})
                    line = [accuracy(rows, question, kind, depth) for depth in depths]
                    if line:
                        curve(panel, depths, line, f"tower {kind}", color)
                panel.axhline(0.5, color=CONTROL, linestyle="--", label="chance")
                panel.set(title=heading, xlabel="vision blocks run", ylabel="accuracy", ylim=(0, 1.05))
                panel.set_xticks(sorted({row["depth"] for row in rows}))
                panel.legend()
            return [save(fig, folder / "vision_depth.png")]


def fit_lenses(bench: Bench, depths: Sequence[int], last: int) -> dict[int, Lens]:
    """Fit ridge regressions from the states of every depth to those that the connector reads.

    Args:
        bench: its calibration pairs are used, nothing else.
        depths: of the tower.
        last: depth that the connector reads.

    Returns:
        depth -> map of states (..., d) in any dtype to float32.
    """
    fits = {depth: _Fit() for depth in depths}
    items = [item for pair in bench.calibration for item in pair.items]
    for batch in bench.batches(items):
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad(), watched_vision(bench.model, [*depths, last], found.__setitem__):
            encoded_images(bench.model, bench.inputs(batch))
        target = found[last].reshape(-1, found[last].shape[-1])
        for depth in depths:
            fits[depth].add(found[depth].reshape(-1, target.shape[-1]), target)
    return {depth: fit.lens() for depth, fit in fits.items()}


class _Fit:
    """Sums of a ridge regression, so that no states are kept."""

    def __init__(self) -> None:
        self.count, self.x, self.y, self.xx, self.xy = 0, *([torch.tensor(0.0)] * 4)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x, self.y = self.x.to(x.device) + x.sum(0), self.y.to(x.device) + y.sum(0)
        self.xx, self.xy = self.xx.to(x.device) + x.T @ x, self.xy.to(x.device) + x.T @ y

    def lens(self) -> Lens:
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(mean_x), device=mean_x.device)
        cross = self.xy / self.count - torch.outer(mean_x, mean_y)
        weight = torch.linalg.solve(covariance + ridge.to(covariance), cross).float()
        shift = (mean_y - mean_x @ weight.double()).float()
        return lambda state: state.float() @ weight + shift


def answers(bench: Bench, depth: int, kind: str, lens: Lens | None) -> Iterator[dict[str, Any]]:
    """Answers of the model with its tower cut, one row per picture and question."""
    relations = bench.relations
    for batch in bench.batches([item for pair in bench.pairs[:PAIRS] for item in pair.items]):
        asked = {
            SPATIAL: [axis_question(item, relations) for item in batch],
            PRESENCE: [item.presence for item in batch],
        }
        for name, questions in asked.items():
            with truncated_vision(bench.model, depth, lens):
                scores = score_questions(bench, batch, questions)
            for item, question, row in zip(batch, questions, scores, strict=True):
                rival = 1 - question.answer
                if name == SPATIAL:
                    rival = relations.index(opposite(relations, item.relation))
                yield {
                    "pair_id": item.pair_id,
                    "picture": item.name,
                    "relation": item.relation,
                    "axis": item.axis,
                    "lens": kind,
                    "depth": depth,
                    "question": name,
                    "margin": float(row[question.answer] - row[rival]),
                    "correct": bool(row[question.answer] > row[rival]),
                    "best": bool(row.argmax() == question.answer),
                }


def chosen(rows: Sequence[dict[str, Any]], question: str, kind: str, depth: int) -> list[dict[str, Any]]:
    """Rows of one arm and question."""
    return [row for row in rows if (row["question"], row["lens"], row["depth"]) == (question, kind, depth)]


def accuracy(
    rows: Sequence[dict[str, Any]], question: str, kind: str, depth: int, measure: str = "correct"
) -> Estimate:
    """Share of right answers of one arm, clustered by pair."""
    own = chosen(rows, question, kind, depth)
    return cluster_proportion(np.array([row[measure] for row in own]), [row["pair_id"] for row in own])


def both_right(rows: Sequence[dict[str, Any]], kind: str, depth: int) -> Estimate:
    """Share of axis pairs of which both pictures are right."""
    found: dict[tuple[str, str], bool] = {}
    for row in chosen(rows, SPATIAL, kind, depth):
        key = (row["pair_id"], row["axis"])
        found[key] = found.get(key, True) and row["correct"]
    return cluster_proportion(np.array(list(found.values())), [pair for pair, _ in found])


def difference(
    rows: Sequence[dict[str, Any]], question: str, first: tuple[str, int], second: tuple[str, int]
) -> Estimate:
    """Accuracy of the first arm minus that of the second on the same pictures, with an interval over pairs."""
    means = []
    for kind, depth in (first, second):
        by_pair: dict[str, list[bool]] = {}
        for row in chosen(rows, question, kind, depth):
            by_pair.setdefault(row["pair_id"], []).append(row["correct"])
        means.append({pair: np.mean(values) for pair, values in by_pair.items()})
    values = np.array([means[0][pair] - means[1][pair] for pair in sorted(means[0])])
    return clustered_mean(values[None], step=STEP)
