"""Readings of answers: what must be accepted, what must not be guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.eval.spatial_tasks.parsing import (
    exact,
    letter,
    official_yes_no,
    paper_letter,
    paper_truth,
    phrase,
    yes_no,
)

DIRECTIONS = ["left", "right", "top", "bottom"]


@pytest.mark.parametrize(
    ("text", "qwen", "llava", "tolerant"),
    [
        ("A", 0, 0, 0),
        ("D", 3, 3, 3),
        ("E", None, None, None),
        ("a", None, None, 0),
        ("A.", None, None, 0),
        ("(A)", None, None, 0),
        ("A:", None, 0, 0),
        ("A: a mug on a table", None, 0, 0),
        ("A. a mug on a table", None, None, 0),
        ("B  ", None, 1, 1),
        ("A cat", None, None, None),
        ("A or B", None, None, None),
        ("A, B", None, None, None),
        ("Answer: A", None, None, 0),
        ("The answer is C.", None, None, 2),
        ("**B**", None, None, 1),
        ("Because", None, None, None),
        ("I think A", None, None, None),
        ("", None, None, None),
        (" ", None, None, None),
        ("Apple", None, None, None),
        ("\n", None, None, None),
    ],
)
def test_lettered_answers(text, qwen, llava, tolerant):
    assert paper_letter(text, 4, "qwen") == qwen
    assert paper_letter(text, 4, "llava") == paper_letter(text, 4, "internvl") == llava
    assert letter(text, 4) == tolerant


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("left", DIRECTIONS, 0),
        ("It is on the left.", DIRECTIONS, 0),
        ("not left", DIRECTIONS, None),
        ("It isn't left", DIRECTIONS, None),
        ("left or right", DIRECTIONS, None),
        ("leftover", DIRECTIONS, None),
        ("", DIRECTIONS, None),
        ("top left", ["top left", "left", "top"], 0),
        ("top left, or left", ["top left", "left"], None),
        ("It is located here", ["cat", "dog"], None),
        ("a cat is located here", ["cat", "dog"], 0),
        ("No.", ["yes", "no"], 1),
        ("no, yes", ["yes", "no"], None),
        ("on the right side", ["on", "right"], None),
        ("Right!", DIRECTIONS, 1),
    ],
)
def test_phrases_are_found_as_whole_words_and_never_through_a_negation(text, options, expected):
    assert phrase(text, options) == expected


@pytest.mark.parametrize(("text", "expected"), [("The left.", 0), ("LEFT", 0), ("left side", None), ("", None)])
def test_exact_answers(text, expected):
    assert exact(text, DIRECTIONS) == expected


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("Yes", True, True),
        ("yes.", True, True),
        ("No", False, False),
        ("No, there is not.", False, False),
        ("There is not a dog. Yes", False, False),
        ("yes and no", None, False),
        ("nothing", None, True),  # official POPE counts everything that does not say no as yes
        ("", None, True),
        ("Yesterday", None, True),
    ],
)
def test_yes_and_no(text, strict, official):
    assert yes_no(text) is strict
    assert official_yes_no(text) is official


@pytest.mark.parametrize(
    ("text", "expected"), [("True", True), ("False", False), ("True or False", True), ("true", None), ("", None)]
)
def test_published_reading_of_true_and_false(text, expected):
    assert paper_truth(text) is expected


@given(st.text(max_size=12))
def test_published_letters_are_a_subset_of_lenient_ones_and_of_the_letters(text):
    strict = paper_letter(text, 4, "qwen")
    assert strict == ("ABCD".index(text) if text in tuple("ABCD") else None)
    if strict is not None:
        assert strict == paper_letter(text, 4, "llava") == letter(text, 4)


def test_unknown_style_is_named():
    with pytest.raises(ValueError, match="style is 'gpt'; accepted are qwen, llava, internvl"):
        paper_letter("A", 4, "gpt")
