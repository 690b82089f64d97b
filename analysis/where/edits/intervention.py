"""E5: turn the relation that a model sees, by a direction estimated on other objects, and see what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dualstream.analysis.interventions import edited_features, edited_states

from ..axis_questions import axis_question, opposite, score_questions
from ..experiment import Experiment, Finding, ReportTable, pending
from ..items import AXES, ROLES
from ..object_sets import first_items, tokens_elsewhere, touched_tokens
from ..states import CONNECTOR
from .relation_directions import PairMeans, control_directions, direction, others, pair_means, sites_of

if TYPE_CHECKING:
    import pyarrow as pa

    from dualstream.analysis.interventions import VisualPlace
    from dualstream.analysis.resumable_rows import ResumableRows

    from ..bench import Bench
    from ..items import WhereItem
    from ..states import Place

NONE, DIRECTION, ELSEWHERE = "none", "direction", "elsewhere"
VECTOR_CONTROLS = ("random", "same_relation", "other_axis")
CONTROLS = (*VECTOR_CONTROLS, ELSEWHERE)
TOWARDS, AWAY = "paper_towards", "paper_away"
DOSES = (0.5, 1.0, 2.0)
PAPER_DOSES = (0.5, 1.0)
MOST_PAIRS = 20  # asked about; directions are estimated on all
MAIN_DOSE = 1.0  # moves the mean difference of the objects by that of the relations
OWN, OTHER = "own", "other"

Change = Callable[[torch.Tensor, dict[str, np.ndarray]], torch.Tensor]


@dataclass(frozen=True)
class Condition:
    """One way to change the objects' tokens.

    Attributes:
        method: ``none``, ``direction``, a control, or one of the published interpolations.
        dose: the factor a.
        site: where; None for ``none``.
        asked: the axis asked for: ``own`` or ``other``.
    """

    method: str
    dose: float
    site: Place | None
    asked: str = OWN

    @property
    def unit(self) -> str:
        """Name of its file."""
        place = "" if self.site is None else f"-{self.site.label}"
        return f"{self.method}{place}-{self.dose:g}-{self.asked}"


class Intervention(Experiment):
    """Add a relation's direction to the two objects' tokens."""

    name = "intervention"
    title = "Turning the relation"
    question = (
        "If the difference of two objects' tokens carries their relation, then adding the mean change from one "
        "relation to its opposite, estimated on pairs without a common object, half to the subject's tokens and half, "
        "negated, to the reference's, should turn the answer: more than vectors of the same length that are random, "
        "come from the same relation or from the other axis, or are added elsewhere. It should leave the other axis "
        "alone."
    )

    def settings(self) -> dict[str, Any]:
        """Doses, and how many pairs are asked about."""
        return {"doses": list(DOSES), "published_doses": list(PAPER_DOSES), "most_pairs": MOST_PAIRS}

    def run(self, bench: Bench, rows: ResumableRows) -> None:
        """One unit per condition."""
        conditions = {condition.unit: condition for condition in conditions_of(bench)}
        if set(conditions) <= rows.done:
            return
        sites = sites_of(bench)
        means = pair_means(bench, bench.pairs, sites)
        for unit in pending(list(conditions), rows, self.title):
            found = []
            for part in bench.batches(first_items(bench, MOST_PAIRS)):
                found += _ask(bench, conditions[unit], part, means)
            rows.write(unit, found)

    def summarize(self, table: pa.Table) -> list[Finding]:
        """Per site: whether the direction turns answers; at the connector: whether it leaves the other axis alone."""
        from .intervention_effects import findings

        return findings(table.to_pandas())

    def tables(self, table: pa.Table) -> list[ReportTable]:
        """Every condition; what happens on the other axis."""
        from .intervention_effects import tables

        return tables(table.to_pandas())

    def figures(self, table: pa.Table, folder: Path) -> list[Path]:
        """Flips by site and by dose."""
        from .intervention_figures import draw_flips

        return [draw_flips(table.to_pandas(), folder / f"{self.name}.png")]


def conditions_of(bench: Bench) -> list[Condition]:
    """All conditions: the model as it is on either axis, then site by site."""
    found = [Condition(NONE, 0.0, None, asked) for asked in (OWN, OTHER)]
    for site in sites_of(bench):
        doses = DOSES if site.stage == CONNECTOR else DOSES[1:]
        found += [Condition(DIRECTION, dose, site) for dose in doses]
        found += [Condition(method, MAIN_DOSE, site) for method in CONTROLS]
        found.append(Condition(DIRECTION, MAIN_DOSE, site, OTHER))
        if site.stage == CONNECTOR:
            found += [Condition(method, dose, site) for method in (TOWARDS, AWAY) for dose in PAPER_DOSES]
    return found


def added(vector: torch.Tensor, dose: float) -> Change:
    """Add half of a vector to the subject's tokens and subtract half from the reference's; textures stay."""

    def change(states: torch.Tensor, tokens: dict[str, np.ndarray]) -> torch.Tensor:
        states = states.clone()
        for role, sign in zip(ROLES, (0.5, -0.5), strict=True):
            states[torch.from_numpy(tokens[role])] += sign * dose * vector.to(states)
        return states

    return change


def interpolated(means: torch.Tensor, dose: float, towards: bool) -> Change:
    """The published edit: every token of an object moves to, or away from, that object's mean in another picture.

    Args:
        means: (2, d) of subject and reference in the picture of the other relation.
        dose: a; at 1 towards it, all tokens of an object become the same.
        towards: ``(1 - a) x + a m``, otherwise ``x + a (x - m)``.
    """
    factor = dose if towards else -dose

    def change(states: torch.Tensor, tokens: dict[str, np.ndarray]) -> torch.Tensor:
        states = states.clone()
        for role, mean in zip(ROLES, means.to(states), strict=True):
            at = torch.from_numpy(tokens[role])
            states[at] = states[at] + factor * (mean - states[at])
        return states

    return change


def edited_site(bench: Bench, site: Place, edit: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Edit the visual tokens at a place; deepstack features keep theirs."""
    if site.stage == CONNECTOR:
        return edited_features(bench.model, edit, deepstack=False)
    return edited_states(bench.model, site.depth, edit)


def _change(bench: Bench, condition: Condition, item: WhereItem, means: Sequence[PairMeans]) -> Change:
    relations = list(bench.relations)
    origin, target = (relations.index(name) for name in (item.relation, opposite(relations, item.relation)))
    if condition.method in (TOWARDS, AWAY):
        own = next(each for each in means if each.pair_id == item.pair_id)
        return interpolated(own.means[target], condition.dose, condition.method == TOWARDS)
    rest = others(means, item.pair_id)
    if condition.method in VECTOR_CONTROLS:
        vectors = control_directions(rest, target, origin, bench.seed, item.name)
        return added(vectors[condition.method], condition.dose)
    return added(direction(rest, target, origin), condition.dose)


def _ask(
    bench: Bench, condition: Condition, items: Sequence[WhereItem], means: dict[Place, list[PairMeans]]
) -> list[dict[str, Any]]:
    changes = (
        [] if condition.site is None else [_change(bench, condition, item, means[condition.site]) for item in items]
    )

    def edit(states: torch.Tensor, at: VisualPlace) -> torch.Tensor:
        item = items[at.image]
        tokens = tokens_elsewhere(bench, item) if condition.method == ELSEWHERE else touched_tokens(bench, item)
        return changes[at.image](states, tokens)

    axes = [item.axis if condition.asked == OWN else AXES[1 - AXES.index(item.axis)] for item in items]
    questions = [axis_question(item, bench.relations, axis) for item, axis in zip(items, axes, strict=True)]
    with nullcontext() if condition.site is None else edited_site(bench, condition.site, edit):
        scores = score_questions(bench, items, questions)
    return [
        {
            "site": "" if condition.site is None else condition.site.label,
            "order": -1 if condition.site is None else condition.site.number,
            "method": condition.method,
            "dose": condition.dose,
            "asked": condition.asked,
            "pair_id": item.pair_id,
            "item": item.name,
            "axis": item.axis,
            "origin": list(bench.relations).index(item.relation),
            "log_likelihoods": scores[number].tolist(),
        }
        for number, item in enumerate(items)
    ]
