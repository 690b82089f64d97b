"""From answers to everything that is reported: figures of every arm, comparisons, the sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dualstream.data_builders.spatial_sft import AXES, RELATIONS
from dualstream.eval.statistics import clustered_share

from .answers import NON_SPATIAL, SPATIAL
from .design import DISTRIBUTIONS, IN, OUT, SCALED, STOCK, TUNED, Study
from .runs import Unit
from .scoring import METRICS, STEPS, correctness, difference, flip_consistent, per_set
from .verdict import Finding, conclusion, find

PLACES = {
    IN: "on pictures as the model was trained on",
    TUNED: "on pictures that only fine-tuning shows",
    OUT: "on pictures that neither shows",
}
CONTROLS = ("permuted", "random", "high-frequency", "rebase")
Key = tuple[str, bool]


class Answers:
    """The answers of one arm: its rows, by run.

    Args:
        runs: rows of every run.
        facts: what each run's file says of it.
        study: the study.
    """

    def __init__(self, runs: list[list[dict[str, Any]]], facts: list[dict[str, Any]], study: Study) -> None:
        self.runs, self.study = runs, study
        self.scalings = [own["scaling"] for own in facts]
        self._correct: dict[tuple[str, str], np.ndarray] = {}

    def values(self, place: str, form: str, metric: str) -> np.ndarray:
        """A metric of every run and object pair, (runs, pairs).

        Args:
            place: a condition, or a distribution: then the mean over its conditions.
            form: how the question is put.
            metric: one of ``METRICS``.
        """
        names = self.study.names(place)
        return np.mean([[per_set(c, metric) for c in self._table(name, form)] for name in names], axis=0)

    def step(self, place: str, metric: str) -> float:
        """What one picture can change a pair's figure by."""
        return STEPS[metric] / len(self.study.names(place))

    def share(self, form: str, field: str) -> np.ndarray:
        """The share of answers for which a field is true, (runs, pairs), over all conditions."""
        rows = [self._rows(run, part=SPATIAL, form=form, mirrored=False) for run in self.runs]
        return np.array([_by_set(run, field) for run in rows])

    def other(self, kind: str | None = None) -> np.ndarray:
        """Right answers to questions that are not about places, (runs, questions)."""
        rows = [self._rows(run, part=NON_SPATIAL) for run in self.runs]
        return np.array([[float(r["correct"]) for r in run if kind in (None, r["kind"])] for run in rows])

    def flips(self, form: str, axis: str) -> np.ndarray:
        """Answers that fit those to the mirror image, (runs, pairs), over all mirrored conditions."""
        columns = [RELATIONS.index(relation) for relation in AXES[axis]]
        names = [c.name for c in self.study.conditions if c.mirrored]
        return np.mean(
            [
                [
                    flip_consistent(self._rows(run, part=SPATIAL, condition=name, form=form))[:, columns].mean(1)
                    for run in self.runs
                ]
                for name in names
            ],
            axis=0,
        )

    def _table(self, condition: str, form: str) -> np.ndarray:
        key = (condition, form)
        if key not in self._correct:
            chosen = {"part": SPATIAL, "condition": condition, "form": form, "mirrored": False}
            self._correct[key] = np.array([correctness(self._rows(run, **chosen)) for run in self.runs])
        return self._correct[key]

    @staticmethod
    def _rows(run: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
        return [row for row in run if all(row[name] == value for name, value in wanted.items())]


def _by_set(rows: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    sets: dict[int, list[bool]] = {}
    for row in rows:
        sets.setdefault(row["set_id"], []).append(bool(row[field]))
    return [float(np.mean(sets[set_id])) for set_id in sorted(sets)]


def read_answers(study: Study, units: Sequence[Unit], out: Path) -> dict[Key, Answers]:
    """The answers of all arms: (arm, tuned) -> its runs, in the order of the units."""
    import pyarrow.parquet as pq

    runs: dict[Key, list[list[dict[str, Any]]]] = {}
    facts: dict[Key, list[dict[str, Any]]] = {}
    for unit in units:
        table = pq.read_table(unit.path(out))
        runs.setdefault((unit.arm, unit.tuned), []).append(table.to_pylist())
        facts.setdefault((unit.arm, unit.tuned), []).append(json.loads(table.schema.metadata[b"facts"]))
    return {key: Answers(runs[key], facts[key], study) for key in runs}


def arm_summary(key: Key, answers: Mapping[Key, Answers], study: Study) -> dict[str, Any]:
    """Everything reported of an arm, JSON-serialisable."""
    own, arm, tuned = answers[key], *key
    baseline, rival = answers[STOCK, False], answers[STOCK, tuned]
    places = [place for place in (*DISTRIBUTIONS, *(c.name for c in study.conditions)) if study.names(place)]

    def mean(values: np.ndarray, step: float) -> dict[str, Any]:
        return clustered_share(values, study.resamples, step=step).to_dict()

    def table(figure: Any) -> dict[str, Any]:
        def metrics(place: str, form: str) -> dict[str, Any]:
            return {metric: figure(place, form, metric) for metric in METRICS}

        return {place: {form: metrics(place, form) for form in study.forms} for place in places}

    def against(reference: Answers) -> dict[str, Any] | None:
        if own is reference:
            return None
        return table(lambda *what: compare(own, reference, *what))

    mirrored = [c for c in study.conditions if c.mirrored]
    kinds = sorted({row["kind"] for row in own.runs[0] if row["part"] == NON_SPATIAL})
    return {
        "arm": arm,
        "tuned": tuned,
        "runs": len(own.runs),
        "scalings": own.scalings,
        "accuracy": table(lambda *what: mean(own.values(*what), own.step(what[0], what[2]))),
        "difference_to_baseline": against(baseline),
        "difference_to_stock": against(rival) if tuned else None,
        "invalid": {form: mean(1 - own.share(form, "valid"), 0.25 / len(study.conditions)) for form in study.forms},
        "flip": {
            form: {axis: mean(own.flips(form, axis), 0.5 / len(mirrored)) for axis in AXES} for form in study.forms
        }
        if mirrored
        else None,
        "non_spatial": {kind or "all": mean(own.other(kind), 1.0) for kind in (None, *kinds)} if kinds else None,
        "non_spatial_difference": difference(own.other(), rival.other(), study.resamples, step=1.0)
        if kinds and own is not rival
        else None,
    }


def compare(own: Answers, reference: Answers, place: str, form: str, metric: str) -> dict[str, Any]:
    """A paired difference of two arms."""
    values, others = own.values(place, form, metric), reference.values(place, form, metric)
    return difference(values, others, own.study.resamples, step=own.step(place, metric))


def findings(answers: Mapping[Key, Answers], study: Study) -> list[Finding]:
    """The comparisons that the conclusion is about: scaled with stock, without and with fine-tuning, in and out."""
    form, metric, found = study.forms[0], METRICS[0], []
    for tuned in (False, True):
        for place in DISTRIBUTIONS:
            if (SCALED, tuned) not in answers or not study.names(place):
                continue
            what = (place, form, metric)
            scaled, stock = answers[SCALED, tuned], answers[STOCK, tuned]
            controls = {
                arm: compare(answers[arm, tuned], scaled, *what)
                for arm in CONTROLS
                if (arm, tuned) in answers and answers[arm, tuned].scalings != scaled.scalings
            }
            where = f"{'with' if tuned else 'without'} fine-tuning {PLACES[place]}"
            found.append(find(where, compare(scaled, stock, *what), controls))
    return found


def summarize(
    study: Study, choice: Mapping[str, Any], grids: Mapping[str, Any], answers: Mapping[Key, Answers]
) -> dict[str, Any]:
    """Everything that is reported, JSON-serialisable, but the manifest.

    Args:
        study: the study.
        choice: what was chosen.
        grids: ``grid`` and ``tuned_grid``: what was measured on validation pictures.
        answers: of all arms.
    """
    found = findings(answers, study)
    return {
        "sentence": conclusion(found),
        "findings": [asdict(finding) for finding in found],
        "choice": dict(choice),
        "arms": [arm_summary(key, answers, study) for key in answers],
        **grids,
    }
