"""Individual, pair and set accuracy against a count by hand; the fair protocol under known policies."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.eval.spatial_tasks import scoring
from dualstream.eval.spatial_tasks.scoring import Verdict, judge_orders

RELATIONS = ["left", "right", "on", "under"]


def verdict(number: int, credit: float, relation: str = "") -> Verdict:
    axis = "x" if number % 4 < 2 else "y"
    return Verdict(
        f"i{number}", credit, 4, relation=relation, pair_id=f"{number // 4}{axis}", set_id=f"{number // 4}", set_size=4
    )


def rows_of(item: str, answer: int, loss, n: int = 4, greedy=True) -> list[dict]:
    """All circular orders of an item; ``loss(place, option)`` is the policy."""
    rows = []
    for start in range(n):
        shown = [(start + i) % n for i in range(n)]
        losses = [loss(place, option) for place, option in enumerate(shown)]
        rows.append(
            {
                "item": item,
                "order": start,
                "orders": n,
                "shown": shown,
                "answer": answer,
                "relations": RELATIONS[:n],
                "pair_id": "",
                "set_id": "",
                "set_size": 0,
                "losses": losses,
                "greedy": [greedy and x == min(losses) for x in losses],
            }
        )
    return rows


def test_a_table_counted_by_hand():
    # set 0: all right; set 1: one wrong; set 2: only three items answered, all right
    credits = [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    verdicts = [verdict(i, credit) for i, credit in enumerate(credits)]
    assert scoring.individual(verdicts) == pytest.approx(10 / 11)
    assert scoring.pair(verdicts) == pytest.approx(4 / 5)  # the lone item of set 2 is no pair
    assert scoring.whole_set(verdicts) == 1 / 2  # set 2 is not complete
    assert len(scoring.complete_pairs(verdicts)) == 5 and len(scoring.complete_sets(verdicts)) == 2


def test_without_complete_groups_there_is_no_figure():
    lone = [verdict(0, 1.0)]
    assert math.isnan(scoring.pair(lone)) and math.isnan(scoring.whole_set(lone))
    assert math.isnan(scoring.individual([]))


@given(st.lists(st.booleans(), min_size=8, max_size=8))
def test_set_is_no_more_than_pair_and_pair_no_more_than_individual(right):
    verdicts = [verdict(i, float(credit)) for i, credit in enumerate(right)]
    assert scoring.whole_set(verdicts) <= scoring.pair(verdicts) <= scoring.individual(verdicts)


def test_flips_count_opposites_right_or_wrong():
    stated = ["left", "right", "under", "on", "right", "left", "on", "on"]
    verdicts = [verdict(i, 0.0, relation) for i, relation in enumerate(stated)]
    assert scoring.flip(verdicts) == 3 / 4
    assert scoring.flip([verdict(0, 0.0, ""), verdict(1, 0.0, "")]) == 0


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_a_constant_letter_scores_exactly_chance(n):
    rows = [row for i in range(20) for row in rows_of(f"i{i}", i % n, lambda place, option: place, n)]
    for row in rows:
        row["relations"] = []
    verdicts = judge_orders(rows)
    assert scoring.individual(verdicts) == pytest.approx(1 / n) == pytest.approx(scoring.chance(verdicts))
    assert scoring.extra("order_mean", verdicts) == pytest.approx(1 / n)
    assert scoring.extra("circular", verdicts) == 0
    assert all(v.predicted is None for v in verdicts)


def test_a_liking_for_a_letter_does_not_hide_what_a_model_knows():
    rows = rows_of("i", 2, lambda place, option: 3.0 * place - 0.5 * (option == 2))
    (judged,) = judge_orders(rows)
    assert judged.credit == 1 and judged.relation == "on"
    assert judged.extra["order_mean"] == 0.25 and judged.extra["circular"] == 0


def test_a_random_answerer_scores_chance():
    rng = random.Random(0)
    rows = [row for i in range(2000) for row in rows_of(f"i{i}", 1, lambda place, option: rng.random())]
    value = scoring.individual(judge_orders(rows))
    assert abs(value - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_items_without_all_their_orders_do_not_count():
    rows = rows_of("a", 0, lambda place, option: option) + rows_of("b", 0, lambda place, option: option)[:3]
    assert [v.item for v in judge_orders(rows)] == ["a"]


def test_unnatural_answers_are_reported_apart():
    (judged,) = judge_orders(rows_of("a", 0, lambda place, option: option, greedy=False))
    assert judged.credit == 1 and judged.invalid == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_an_error_not_a_wrong_answer(bad):
    with pytest.raises(ValueError, match="item a: losses"):
        judge_orders(rows_of("a", 0, lambda place, option: bad))


def test_an_order_answered_twice_is_an_error():
    rows = rows_of("a", 0, lambda place, option: option)
    with pytest.raises(ValueError, match="order 0 of item a was answered twice"):
        judge_orders([*rows, rows[0]])


def test_best_constant_place():
    verdicts = [Verdict(str(i), 0.0, 2, answer=int(i < 3)) for i in range(10)]
    assert scoring.constant(verdicts) == 0.7
