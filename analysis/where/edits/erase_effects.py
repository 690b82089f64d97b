"""What erasing objects does to the answers, from the rows of ``erase``."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..effects import POINTS, SMALLEST_CHANGE, Effect, corrected, effect, on_items, pair_of_item, rate
from ..experiment import NO, OPEN, YES, Finding, ReportTable
from ..items import ROLES
from .erased_pictures import FILLINGS

NONE, OBJECTS, CORE, ELSEWHERE, REST = "none", "objects", "core", "elsewhere", "rest"
PIXELS = "P"
NEGLIGIBLE = 5.0  # points; a smaller loss beyond the control counts as none


def findings(frame: pd.DataFrame) -> list[Finding]:
    """One statement per level."""
    losses, beyond, found = changes(frame, "correct"), losses_beyond_control(frame), []
    for level in levels(frame):
        own = {filling: beyond[level, filling] for filling in FILLINGS if (level, filling) in beyond}
        # The filling that did least decides which figure is shown.
        shown = max(own, key=lambda filling: losses[level, OBJECTS, filling].estimate.value)
        verdict = OPEN
        if all(each.is_below() for each in own.values()):
            verdict = YES
        elif any(each.estimate.low > -NEGLIGIBLE for each in own.values()):
            verdict = NO
        found.append(
            Finding(
                f"Erasing both objects {_named(level)} costs more right answers than erasing as much elsewhere",
                losses[level, OBJECTS, shown].estimate,
                verdict,
                "yes: paired difference to the control below 0 with every filling (Holm p <= .05 over levels and "
                f"fillings); no: a loss of {NEGLIGIBLE:g} points beyond the control excluded with some filling",
                losses[level, ELSEWHERE, shown].estimate,
                f"elsewhere, filling: {shown}",
                "points",
            )
        )
    return found


def change_table(frame: pd.DataFrame) -> ReportTable:
    """Every erasure against the model as it is."""
    accuracy, shares = changes(frame, "correct"), changes(frame, "probability")
    beyond = losses_beyond_control(frame)
    base = on_items(frame, "correct", what=NONE)
    lines: list[tuple[Any, ...]] = [("", "nothing: right, %", "", rate(POINTS * base, _pairs(frame, base)), "", "")]
    for (level, what, filling), found in accuracy.items():
        p_value = beyond[level, filling].corrected if what == OBJECTS else ""
        lines.append((level, what, filling, found.estimate, shares[level, what, filling].estimate, p_value))
    columns = ("level", "erased", "filled with", "right, points", "P(right), points", "Holm p beyond elsewhere")
    note = (
        "P is the picture, C the connector's output, Lk the language model after k blocks; P(right) is of all four "
        "relations. Core: tokens that an object covers by half; rest: all that the objects do not touch."
    )
    return ReportTable("Change of the answers when something is erased", columns, lines, note)


def changes(frame: pd.DataFrame, column: str) -> dict[tuple[str, str, str], Effect]:
    """(level, what, filling) -> change against the model as it is, in points."""
    base = on_items(frame, column, what=NONE)
    found = {}
    for level, what, filling in _arms(frame):
        own = on_items(frame, column, level=level, what=what, filling=filling)
        step = SMALLEST_CHANGE if column == "correct" else 0.0
        found[level, what, filling] = effect(POINTS * (own - base.loc[own.index]), _pairs(frame, own), step)
    return found


def losses_beyond_control(frame: pd.DataFrame) -> dict[tuple[str, str], Effect]:
    """(level, filling) -> right answers with the objects erased minus with as much erased elsewhere, points; Holm."""
    found = {}
    for level, what, filling in _arms(frame):
        if what == OBJECTS:
            own = on_items(frame, "correct", level=level, what=OBJECTS, filling=filling)
            control = on_items(frame, "correct", level=level, what=ELSEWHERE, filling=filling).loc[own.index]
            found[level, filling] = effect(POINTS * (own - control), _pairs(frame, own), SMALLEST_CHANGE)
    return corrected(found)


def levels(frame: pd.DataFrame) -> list[str]:
    """Levels in the order of the way through the model."""
    return list(frame[frame["what"] != NONE].sort_values("order")["level"].unique())


def _arms(frame: pd.DataFrame) -> list[tuple[str, str, str]]:
    order = {name: number for number, name in enumerate((OBJECTS, *ROLES, CORE, ELSEWHERE, REST))}
    found = frame[frame["what"] != NONE].drop_duplicates(["level", "what", "filling"])
    arms = zip(found["order"], found["level"], found["what"], found["filling"], strict=True)
    ranked = sorted(arms, key=lambda arm: (arm[0], order[arm[2]], FILLINGS.index(arm[3])))
    return [(level, what, filling) for _, level, what, filling in ranked]


def _pairs(frame: pd.DataFrame, values: pd.Series) -> pd.Series:
    return pair_of_item(frame).loc[values.index]


def _named(level: str) -> str:
    if level == PIXELS:
        return "from the picture"
    return "behind the connector" if level == "C" else f"after block {level[1:]} of the language model"
