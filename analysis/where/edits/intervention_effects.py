"""What interventions do to the answers, from their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from dualstream.eval.option_scores import option_probabilities
from dualstream.eval.statistics import Estimate

from ..effects import POINTS, SMALLEST_CHANGE, Effect, corrected, effect, rate
from ..experiment import NO, OPEN, YES, Finding, ReportTable, above
from ..states import CONNECTOR, Place
from .intervention import CONTROLS, DIRECTION, MAIN_DOSE, NONE, OTHER, OWN

CONNECTOR_LABEL = Place(0, CONNECTOR, 0).label
KEY = ("site", "method", "dose")
NEGLIGIBLE = 10.0  # points of flips; a smaller lead over a control counts as none
NEGLIGIBLE_SHIFT = 0.5  # nats of log-odds, the same


def outcomes(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with what an edit did on the axis of the relation.

    Args:
        frame: all rows.

    Returns:
        The rows asked on the own axis, edited, whose answer was right before; with ``flip``: 100 where the answer is
        now the opposite relation; ``right``: 100 where it still is the relation; ``probability``: change of the
        opposite's share of all four, points; ``shift``: change of the log-odds of the opposite against the relation.
    """
    own = frame[frame["asked"] == OWN].reset_index(drop=True)
    scores = np.stack(own["log_likelihoods"].to_numpy()).astype(np.float64)
    origin = own["origin"].to_numpy()
    rows, target = np.arange(len(own)), origin ^ 1
    answers, shares = scores.argmax(1), option_probabilities(scores)
    table = own.drop(columns=["log_likelihoods"]).assign(
        flip=POINTS * (answers == target),
        right=POINTS * (answers == origin),
        share=POINTS * shares[rows, target],
        odds=scores[rows, target] - scores[rows, origin],
    )
    before = table[table["method"] == NONE].set_index("item")
    kept = before.index[before["right"] == POINTS]
    edited = table[(table["method"] != NONE) & table["item"].isin(kept)]
    old = before.loc[edited["item"]]
    return edited.assign(
        probability=edited["share"] - old["share"].to_numpy(), shift=edited["odds"] - old["odds"].to_numpy()
    )


def leakage(frame: pd.DataFrame) -> pd.DataFrame:
    """How far the direction (dose 1) moves the log-odds on the relation's axis and on the other one.

    Returns:
        Columns ``site``, ``order``, ``pair_id``, ``item``; ``own`` and ``other``: absolute change of the log-odds of
        an axis's two relations, each under the question about that axis; ``turned``: 100 where the answer on the
        other axis changes.
    """
    parts = []
    for asked in (OWN, OTHER):
        rows = frame[frame["asked"] == asked]
        scores = np.stack(rows["log_likelihoods"].to_numpy()).astype(np.float64)
        first = np.where((rows["origin"] < 2) == (asked == OWN), 0, 2)
        at = np.arange(len(rows))
        odds = scores[at, first] - scores[at, first + 1]
        rows = rows.assign(odds=odds, answer=scores.argmax(1))
        before = rows[rows["method"] == NONE].set_index("item")
        edited = rows[(rows["method"] == DIRECTION) & (rows["dose"] == MAIN_DOSE)]
        old = before.loc[edited["item"]]
        edited = edited.assign(
            moved=np.abs(edited["odds"] - old["odds"].to_numpy()),
            turned=POINTS * (edited["answer"] != old["answer"].to_numpy()),
        )
        parts.append(edited.set_index(["site", "item"]))
    own, other = parts
    other = other.loc[own.index]
    return pd.DataFrame(
        {
            "order": own["order"],
            "pair_id": own["pair_id"],
            "own": own["moved"],
            "other": other["moved"],
            "turned": other["turned"],
        }
    ).reset_index()


def leads(table: pd.DataFrame, column: str, step: float = 0.0) -> dict[tuple[str, str], Effect]:
    """(site, control) -> a figure under the direction minus that under the control; Holm over all of them.

    Args:
        table: of ``outcomes``.
        column: ``flip`` or ``shift``.
        step: see ``effect``.
    """
    found = {}
    main = table[table["dose"] == MAIN_DOSE]
    for site in sites(table):
        own = main[(main["site"] == site) & (main["method"] == DIRECTION)].set_index("item")
        for control in CONTROLS:
            other = main[(main["site"] == site) & (main["method"] == control)].set_index("item").loc[own.index]
            found[site, control] = effect(own[column] - other[column], own["pair_id"], step)
    return corrected(found)


def sites(table: pd.DataFrame) -> list[str]:
    """Labels of the sites on the way through the model."""
    return list(table.sort_values("order")["site"].unique())


def findings(frame: pd.DataFrame) -> list[Finding]:
    """Per site: answers turned and log-odds moved, against four controls; at the connector: the other axis."""
    table, leaks = outcomes(frame), leakage(frame)
    flips, shifts = leads(table, "flip", SMALLEST_CHANGE), leads(table, "shift")
    found = []
    for site in sites(table):
        rows = table[(table["site"] == site) & (table["dose"] == MAIN_DOSE)]
        rates = {method: rate(own["flip"], own["pair_id"]) for method, own in rows.groupby("method")}
        moves = {method: effect(own["shift"], own["pair_id"]).estimate for method, own in rows.groupby("method")}
        found.append(
            _against_controls(
                f"Added {_named(site)}, the direction from other pairs turns answers to the opposite relation",
                {control: flips[site, control] for control in CONTROLS},
                rates,
                (NEGLIGIBLE, "% of answers turned", "points"),
            )
        )
        found.append(
            _against_controls(
                f"Added {_named(site)}, it makes the opposite relation more likely",
                {control: shifts[site, control] for control in CONTROLS},
                moves,
                (NEGLIGIBLE_SHIFT, "nats of log-odds", "nats"),
            )
        )
    rows = leaks[leaks["site"] == CONNECTOR_LABEL]
    specific = effect(rows["own"] - rows["other"], rows["pair_id"]).estimate
    found.append(
        Finding(
            f"Added {_named(CONNECTOR_LABEL)}, it moves its own axis more than the other one",
            effect(rows["own"], rows["pair_id"]).estimate,
            above(specific, 0.0),
            "yes: paired difference of the absolute changes of log-odds above 0; no: below",
            effect(rows["other"], rows["pair_id"]).estimate,
            "the other axis, asked about by itself",
            "nats of log-odds",
        )
    )
    return found


def _against_controls(
    statement: str, lead: Mapping[str, Effect], found: Mapping[str, Estimate], scale: tuple[float, str, str]
) -> Finding:
    """``yes`` if every control is beaten, ``no`` if a lead of some size over one of them is excluded."""
    least, unit, short = scale
    beaten = all(each.is_above() for each in lead.values())
    useless = any(each.estimate.high < least for each in lead.values())
    strongest = max(lead, key=lambda control: found[control].value)
    return Finding(
        statement,
        found[DIRECTION],
        YES if beaten else NO if useless else OPEN,
        "yes: more than under each of four controls (interval above 0, Holm p <= .05 over places and controls); no: a "
        f"lead of {least:g} {short} over some control is excluded",
        found[strongest],
        f"strongest control ({strongest})",
        unit,
    )


def tables(frame: pd.DataFrame) -> list[ReportTable]:
    """All conditions, and the other axis."""
    table, leaks = outcomes(frame), leakage(frame)
    lead = leads(table, "shift")
    lines: list[tuple[Any, ...]] = []
    order = {name: number for number, name in enumerate((DIRECTION, *CONTROLS))}
    groups = [(key, own) for key, own in table.groupby(list(KEY))]
    groups.sort(key=lambda group: (group[1]["order"].iloc[0], order.get(group[0][1], 9), group[0][1], group[0][2]))
    for (site, method, dose), own in groups:
        measured = [rate(own[name], own["pair_id"]) for name in ("flip", "right")]
        measured += [effect(own[name], own["pair_id"]).estimate for name in ("probability", "shift")]
        p_value = lead[site, method].corrected if (site, method) in lead else ""
        lines.append((site, method, dose, *measured, p_value))
    columns = (
        "place",
        "what is added",
        "dose",
        "turned, %",
        "still right, %",
        "P(opposite), points",
        "log-odds, nats",
        "Holm p of the lead in log-odds",
    )
    note = (
        f"{table['item'].nunique()} pictures whose answer was right before. C is the connector's output, Lk the "
        "language model after k blocks. paper_towards and paper_away are the published interpolation; at dose 1 "
        "towards, all tokens of an object become the same vector: its effect cannot be told from a loss of detail."
    )
    other = []
    for site in sites(table):
        rows = leaks[leaks["site"] == site]
        other.append(
            (
                site,
                *(effect(rows[name], rows["pair_id"]).estimate for name in ("own", "other")),
                rate(rows["turned"], rows["pair_id"]),
            )
        )
    heads = ("place", "own axis, |change| in nats", "other axis, |change| in nats", "answers changed there, %")
    return [
        ReportTable("Answers under interventions", columns, lines, note),
        ReportTable("Leakage of the direction (dose 1) to the other axis", heads, other),
    ]


def _named(site: str) -> str:
    return "to the connector's output" if site == CONNECTOR_LABEL else f"after block {site[1:]} of the language model"
