"""Scorers against a list of texts that careless ones get wrong, and against properties (T15)."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualstream.analysis.causality.scorers import (
    TRAPS,
    ClassWords,
    answered_with,
    judge_trap,
    said_yes,
    self_test,
)

WORDS = st.sampled_from(["located", "scatter", "cat", "cats", "dog", "a", "the", "catalogue", "concatenate", "Cat"])


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: f"{trap.scorer}-{trap.name}-{trap.text[:30]}")
def test_no_trap_catches_our_scorers(trap):
    assert judge_trap(trap) is trap.expected, trap.why


def test_the_self_test_names_what_a_careless_scorer_gets_wrong():
    def careless(trap):
        if trap.scorer == "yes":
            return "yes" in trap.text.lower()
        return trap.name in trap.text

    caught = {(trap.name, trap.text) for trap in self_test(careless)}
    assert ("cat", "The house is located on a hill.") in caught and ("tv", "A TV on a stand.") in caught
    assert ("", "No, there isn't, although yesterday there was") in caught
    assert self_test() == []


def test_traps_hold_every_confusion_that_is_known_of_the_public_code():
    """D4: parts of words; D5: nothing said, and the first letters of a class."""
    pairs = {(trap.name, trap.expected) for trap in TRAPS if trap.scorer == "mention"}
    assert {(name, False) for name in ("cat", "bed", "cup", "tie", "car", "bus", "bear")} <= pairs
    short = {trap.text.strip(" \n.") for trap in TRAPS if trap.scorer == "answer" and trap.expected is not True}
    assert {"", "c", "ci"} <= short
    assert {True, False, None} <= {trap.expected for trap in TRAPS}


@given(st.lists(WORDS, max_size=8))
def test_without_denials_a_mention_is_a_whole_word_in_either_number(words):
    expected = any(re.fullmatch(r"cats?", word, re.IGNORECASE) for word in words)
    assert ClassWords("cat").mentioned(" ".join(words)) == expected


@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from(["no", "not a", "there isn't a", "without any"]))
def test_a_denial_denies_all_of_its_clause(words, denial):
    assert not ClassWords("cat").mentioned(f"{denial} {' '.join(words)}")
    assert ClassWords("cat").mentioned(f"{denial} {' '.join(words)}. A cat.")


def test_synonyms_and_names_of_several_words():
    words = ClassWords("person", ("man", "woman", "police officer"))
    assert all(words.mentioned(text) for text in ("two women", "A man", "police officers", "person's hat"))
    assert not words.mentioned("a manual for police dogs")
    assert ClassWords("traffic light").mentioned("Traffic-lights at night")


def test_answers_that_say_nothing_are_neither_right_nor_wrong():
    assert answered_with(" \n", ClassWords("ring")) is None
    assert said_yes("maybe") is None and said_yes("No.") is False and said_yes("Yes!") is True


def test_a_class_without_a_name_is_refused():
    with pytest.raises(ValueError, match="at least one letter"):
        ClassWords("  ")
