"""From answers to individual, pair and set accuracy.

A *pair* is two pictures of the same two objects that show opposite relations, a *set* all pairs of the same objects.
Both count only when every one of their items was answered: a subset of a benchmark must not pass off a lone item as a
failed set. Credit is a number from 0 to 1: options that score the same share it, as if one were drawn at random.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .items import OPPOSITE
from .parsing import phrase

TIE = 1e-6  # losses this near to one another are equal
PAIR_SIZE = 2


@dataclass(frozen=True)
class Verdict:
    """What became of one item.

    Attributes:
        item: its id.
        credit: 1 right, 0 wrong, a share where several options tie.
        options: number of options.
        answer: index of the right option.
        predicted: index of the chosen option; None: no answer, or a tie.
        relation: relation that the chosen option states; "" where there is none.
        invalid: share of what was asked about the item that got no valid answer.
        pair_id: of the item, "" if it has none.
        set_id: likewise.
        set_size: number of items of a complete set.
        extra: further figures of the item, by name.
    """

    item: str
    credit: float
    options: int
    answer: int = 0
    predicted: int | None = None
    relation: str = ""
    invalid: float = 0.0
    pair_id: str = ""
    set_id: str = ""
    set_size: int = 0
    extra: Mapping[str, float] | None = None


def individual(verdicts: Sequence[Verdict]) -> float:
    """Mean credit; NaN without items."""
    return _mean(verdict.credit for verdict in verdicts)


def pair(verdicts: Sequence[Verdict]) -> float:
    """Share of complete pairs with both items right; NaN without a complete pair."""
    return _mean(math.prod(v.credit for v in group) for group in complete_pairs(verdicts))


def whole_set(verdicts: Sequence[Verdict]) -> float:
    """Share of complete sets with all items right; NaN without a complete set."""
    return _mean(math.prod(v.credit for v in group) for group in complete_sets(verdicts))


def flip(verdicts: Sequence[Verdict]) -> float:
    """Share of complete pairs in which the stated relation turns into its opposite with the picture, right or wrong.

    A policy that does not look at the picture never flips, since the two questions of a pair have the same words.
    """
    return _mean(
        float(bool(group[0].relation) and OPPOSITE.get(group[0].relation) == group[1].relation)
        for group in complete_pairs(verdicts)
    )


def invalid(verdicts: Sequence[Verdict]) -> float:
    """Share of what was asked that got no valid answer; it counts as wrong in the accuracies and is shown apart."""
    return _mean(verdict.invalid for verdict in verdicts)


def chance(verdicts: Sequence[Verdict]) -> float:
    """Accuracy of guessing: the mean of one over the number of options."""
    return _mean(1 / verdict.options for verdict in verdicts)


def constant(verdicts: Sequence[Verdict]) -> float:
    """Accuracy of the best policy that always gives the option at the same place, without looking at anything."""
    if not verdicts:
        return math.nan
    places: dict[int, int] = defaultdict(int)
    for verdict in verdicts:
        places[verdict.answer] += 1
    return max(places.values()) / len(verdicts)


def extra(name: str, verdicts: Sequence[Verdict]) -> float:
    """Mean of a further figure of the items."""
    return _mean(verdict.extra[name] for verdict in verdicts if verdict.extra)


def relation_accuracy(
    predictions: Sequence[str],
    references: Sequence[str],
    pairs: Sequence[str] | None = None,
    sets: Sequence[str] | None = None,
    set_size: int = 4,
    options: Sequence[str] | None = None,
) -> dict[str, float | int | None]:
    """Score written answers that name a relation.

    Args:
        predictions: answers as written; the one option they state counts, see ``parsing.phrase``.
        references: the right relations.
        pairs: for each answer the name of its pair, "" for none.
        sets: likewise of its set.
        set_size: number of items of a complete set.
        options: what can be answered; by default all references.

    Returns:
        ``individual``, ``pair``, ``set``, ``flip`` (None where nothing is complete), ``invalid``, and the counts
        ``n``, ``pairs``, ``sets``.

    Raises:
        ValueError: there are no answers, lists differ in length, or a reference is not among the options.
    """
    _check_lists(predictions, {"references": references, "pairs": pairs, "sets": sets})
    names = list(dict.fromkeys(references if options is None else options))
    verdicts = []
    for number, (text, truth) in enumerate(zip(predictions, references, strict=True)):
        pair_id, set_id = pairs[number] if pairs else "", sets[number] if sets else ""
        verdicts.append(_verdict_of(str(number), text, truth, names, pair_id, set_id, set_size))
    figures = {
        "individual": individual(verdicts),
        "pair": pair(verdicts),
        "set": whole_set(verdicts),
        "flip": flip(verdicts),
        "invalid": invalid(verdicts),
    }
    return {
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
        "n": len(verdicts),
        "pairs": len(complete_pairs(verdicts)),
        "sets": len(complete_sets(verdicts)),
    }


def _check_lists(predictions: Sequence[str], lists: dict[str, Sequence[str] | None]) -> None:
    """Refuse no answers, and lists of another length than theirs."""
    for name, values in lists.items():
        if not predictions or (values is not None and len(values) != len(predictions)):
            raise ValueError(
                f"predictions and {name} must be paired: {len(predictions)} and {len(values or ())} given."
            )


def _verdict_of(
    item: str, text: str, truth: str, names: list[str], pair_id: str, set_id: str, set_size: int
) -> Verdict:
    """What a written answer is worth."""
    if truth not in names:
        raise ValueError(f"reference {truth!r} is not among the options {', '.join(names)}.")
    said = phrase(text, names)
    return Verdict(
        item=item,
        credit=float(said is not None and names[said] == truth),
        options=len(names),
        answer=names.index(truth),
        predicted=said,
        relation="" if said is None else names[said],
        invalid=float(said is None),
        pair_id=pair_id,
        set_id=set_id,
        set_size=set_size,
    )


def complete_pairs(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """The pairs of which both items were answered, in order of first appearance."""
    groups = _groups(verdicts, "pair_id")
    return [group for group in groups if len(group) == PAIR_SIZE]


def complete_sets(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """The sets of which all items were answered, in order of first appearance."""
    groups = _groups(verdicts, "set_id")
    return [group for group in groups if len(group) == group[0].set_size]


def judge_orders(rows: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts from option losses in several orders of the options.

    An item counts when all its orders were asked. The answer is the option with the least loss summed over the orders:
    since every option stood at every place, what a model likes about a place or a letter cancels out.

    Args:
        rows: one per item and order, with the columns of ``docs.FAIR_COLUMNS`` and ``losses`` (of the choices as
            shown, lower is better) and ``greedy`` (whether each choice is what the model would have written).

    Returns:
        One verdict per complete item, with ``order_mean`` (share of orders answered right) and ``circular`` (all
        orders right) as extra figures. ``invalid`` is the share of orders in which the model would have written none
        of the choices.

    Raises:
        ValueError: a loss is not a finite number, an order came twice, or a row has the wrong number of losses.
    """
    items: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["order"] in items[row["item"]]:
            raise ValueError(f"order {row['order']} of item {row['item']} was answered twice.")
        items[row["item"]][row["order"]] = row
    return [_judge(list(orders.values())) for orders in items.values() if _has_all(orders)]


def _has_all(orders: Mapping[int, Mapping[str, Any]]) -> bool:
    return len(orders) == next(iter(orders.values()))["orders"]


def _judge(rows: list[Mapping[str, Any]]) -> Verdict:
    first = rows[0]
    n = len(first["shown"])
    totals, right, unnatural = [0.0] * n, [], []
    for row in rows:
        losses = _checked(row)
        for option, loss in zip(row["shown"], losses, strict=True):
            totals[option] += loss
        right.append(_credit(losses, row["shown"].index(row["answer"])))
        unnatural.append(not any(row["greedy"]))
    best = _best(totals)
    predicted = best[0] if len(best) == 1 else None
    return Verdict(
        item=first["item"],
        credit=_credit(totals, first["answer"]),
        options=n,
        answer=first["answer"],
        predicted=predicted,
        relation=first["relations"][predicted] if predicted is not None and first["relations"] else "",
        invalid=_mean(float(x) for x in unnatural),
        pair_id=first["pair_id"],
        set_id=first["set_id"],
        set_size=first["set_size"],
        extra={"order_mean": _mean(right), "circular": math.prod(right)},
    )


def _checked(row: Mapping[str, Any]) -> list[float]:
    losses = [float(loss) for loss in row["losses"]]
    if len(losses) != len(row["shown"]) or not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"item {row['item']}: losses {losses} for {len(row['shown'])} choices; one number for each.")
    return losses


def _best(losses: Sequence[float]) -> list[int]:
    least = min(losses)
    return [index for index, loss in enumerate(losses) if loss - least <= TIE]


def _credit(losses: Sequence[float], answer: int) -> float:
    best = _best(losses)
    return 1 / len(best) if answer in best else 0.0


def _groups(verdicts: Sequence[Verdict], name: str) -> list[list[Verdict]]:
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if getattr(verdict, name):
            groups[getattr(verdict, name)].append(verdict)
    return list(groups.values())


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
