"""The sentence the data support, from intervals alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POSITIVE, NEGATIVE, INCONCLUSIVE = "positive", "negative", "inconclusive"
_VERBS = {POSITIVE: "raises", NEGATIVE: "lowers"}


@dataclass(frozen=True)
class Finding:
    """A comparison with its verdict.

    Attributes:
        where: what was compared and on which pictures, to be read after "RoPE scaling".
        difference: ``value``, ``low``, ``high``, ``n`` and ``runs``, in shares.
        verdict: ``positive``, ``negative`` or ``inconclusive``.
        rivals: controls that a positive effect could not be told from, or that did better.
        controls: all controls it was compared with.
    """

    where: str
    difference: Mapping[str, Any]
    verdict: str
    rivals: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()


def judge(difference: Mapping[str, Any]) -> str:
    """Whether a difference is told from none: its interval excludes 0 and every run points the same way."""
    runs: Sequence[float] = difference["runs"]
    if difference["low"] > 0 and all(run > 0 for run in runs):
        return POSITIVE
    if difference["high"] < 0 and all(run < 0 for run in runs):
        return NEGATIVE
    return INCONCLUSIVE


def find(where: str, difference: Mapping[str, Any], over_controls: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Judge a comparison.

    Args:
        where: see ``Finding``.
        difference: the scaled arm minus the stock one.
        over_controls: control -> that control minus the scaled arm.
    """
    rivals = tuple(name for name, own in over_controls.items() if judge(own) != NEGATIVE)
    return Finding(where, difference, judge(difference), rivals, tuple(over_controls))


def finding_text(finding: Finding) -> str:
    """A finding as a clause."""
    d = finding.difference
    figures = f"{_points(d['value'])} points [{_points(d['low'])}, {_points(d['high'])}], {d['n']} object pairs"
    if finding.verdict == INCONCLUSIVE:
        bound = 100 * max(abs(d["low"]), abs(d["high"]))
        return f"{finding.where}: inconclusive ({figures}; a change of more than {bound:.1f} points is excluded)"
    text = f"{finding.where}: {finding.verdict}, it {_VERBS[finding.verdict]} accuracy ({figures})"
    if finding.verdict == NEGATIVE or not finding.controls:
        return text
    if finding.rivals:
        return f"{text}, but so as not to be told from the control {_listed(finding.rivals)}"
    return f"{text}, more than every control ({_listed(finding.controls)})"


def conclusion(findings: Sequence[Finding]) -> str:
    """One sentence for all comparisons, then each as a clause.

    An effect counts as one of RoPE scaling only where no control reaches it.
    """
    own = [f for f in findings if f.verdict == POSITIVE and not f.rivals]
    shared = [f for f in findings if f.verdict == POSITIVE and f.rivals]
    harmful = [f for f in findings if f.verdict == NEGATIVE]
    parts = []
    if own:
        parts.append(f"RoPE scaling helps {_listed([f.where for f in own])}")
    if shared:
        where = _listed([f.where for f in shared])
        parts.append(f"an effect {where} is no better than that of a control, so it is not shown to come from this g")
    if harmful:
        parts.append(f"{'RoPE scaling' if not parts else 'it'} harms {_listed([f.where for f in harmful])}")
    open_ones = [f.where for f in findings if f.verdict == INCONCLUSIVE]
    if open_ones and parts:
        parts.append(f"nothing is shown {_listed(open_ones)}")
    if not parts:
        parts.append("these data show no effect of RoPE scaling on where-questions, neither help nor harm")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}. In detail: {'; '.join(map(finding_text, findings))}."


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
