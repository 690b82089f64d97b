"""Prompts: the published ones character by character, orders, and the words of fair questions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.eval.spatial_tasks.items import Item, circular_orders, seeded_order
from dualstream.eval.spatial_tasks.prompts import (
    fair_choice_prompt,
    named_options,
    paper_choice_prompt,
    paper_statement_prompt,
    rename_options,
)

I12 = " " * 12


def test_published_prompts_to_the_character():
    assert paper_choice_prompt(["A mug on a table", "A mug under a table"]) == (
        f"\n{I12}Please choose the best decription for the image from the following 2 options:\n"
        f"\n{I12}A: A mug on a table\n"
        f"\n{I12}B: A mug under a table\n"
        f"\n{I12}Please answer with A or B.\nYour answer is:\n{I12}"
    )
    assert "the following 4 options:" in paper_choice_prompt("abcd")
    assert paper_choice_prompt("abcd", "internvl").endswith(f"answer with A, B, C or D.\nYour answer is:\n{I12}")
    assert paper_choice_prompt("abcd", "llava").endswith(
        f"Please select the correct option and return only the letter of the option.\nYour choice is:\n{I12}"
    )
    assert paper_statement_prompt("The cat is on the mat.") == (
        f"\n{I12}Please check if the following description is correct:\n\n\n"
        f"{I12}Description: The cat is on the mat.\n\n\n"
        f'{I12}Please answer with either "True" or "False".\n{I12}Your answer is:\n{I12}'
    )


def test_fair_prompts_are_plain():
    assert fair_choice_prompt(["x", "y"]) == (
        "Which description fits the image?\nA. x\nB. y\nAnswer with the letter of the option."
    )
    with pytest.raises(ValueError, match="2 to 9"):
        fair_choice_prompt(["x"])


@given(st.integers(1, 9))
def test_circular_orders_put_every_option_once_at_every_place(n):
    orders = circular_orders(n)
    assert len(orders) == n
    for place in range(n):
        assert sorted(order[place] for order in orders) == list(range(n))
    assert all(sorted(order) == list(range(n)) for order in orders)


def test_random_orders_depend_on_the_item_alone_and_are_even():
    orders = [seeded_order(f"item-{i}", 4) for i in range(4000)]
    assert orders == [seeded_order(f"item-{i}", 4) for i in range(4000)]
    for place in range(4):
        share = sum(order[place] == 0 for order in orders) / len(orders)
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("question", "options", "order", "expected"),
    [
        ("Is it left or right?", ["left", "right"], (1, 0), "Is it right or left?"),
        (
            "Which is higher, the red star or the ring?",
            ["red star", "ring"],
            (1, 0),
            "Which is higher, the ring or the red star?",
        ),
        ("a, b or c", ["a", "b", "c"], (2, 0, 1), "c, a or b"),
    ],
)
def test_options_named_in_a_question_change_places(question, options, order, expected):
    assert named_options(question, options) == list(range(len(options)))
    assert rename_options(question, options, order) == expected


@pytest.mark.parametrize("question", ["Is it left?", "left, left or right", "Is the bright one to the left?"])
def test_questions_that_do_not_name_each_option_once_have_no_order(question):
    assert named_options(question, ["left", "right"]) == []
    with pytest.raises(ValueError, match="exactly once"):
        rename_options(question, ["left", "right"], (0, 1))


@pytest.mark.parametrize(("options", "answer"), [(("a", "a"), 0), (("a", "b"), 2), (("a", "b"), -1)])
def test_items_with_no_single_right_answer_are_refused(options, answer):
    with pytest.raises(ValueError, match="item x"):
        Item("x", "", options, answer)
