"""Classes of a pruned decoder: merged by normal form, the frequent ones kept, a closed and consistent table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.modeling.decoder_tables import check_classes
from dualstream.train.decoder_classes import choose_classes, normal_forms

TEXTS = [" Dog", "dog", " cat", ".", " other", "™", "tm", "ﬁne", "Fine", " sky", "", " "]
MEANINGLESS = [False, False, False, True, False, True, False, False, False, False, True, True]


def test_normal_forms_merge_case_blanks_and_compatibility_but_never_a_sign_with_a_word():
    forms = dict(zip(TEXTS, normal_forms(TEXTS, MEANINGLESS), strict=True))
    assert forms[" Dog"] == forms["dog"] == (False, "dog")
    assert forms["ﬁne"] == forms["Fine"] == (False, "fine")
    assert forms["™"] == (True, "tm")
    assert forms["™"] != forms["tm"]
    assert forms[""] == forms[" "]


def test_frequent_forms_are_kept_and_other_is_the_word_other():
    counts = torch.tensor([3, 5, 4, 9, 0, 0, 1, 0, 0, 0, 0, 0])
    tables = choose_classes(counts, TEXTS, MEANINGLESS, max_classes=4)
    assert tables.class_tokens.tolist() == [3, 1, 2, 4]  # ".", "dog" (5 > 3), "cat"; " other" reads for the rest
    assert tables.token_classes.tolist() == [1, 1, 2, 0, 3, 3, 3, 3, 3, 3, 3, 3]
    assert tables.token_classes.dtype == torch.int32
    coverage = tables.coverage
    assert (coverage.readings, coverage.forms_seen, coverage.classes) == (22, 4, 4)
    assert coverage.covered == pytest.approx(21 / 22)
    assert coverage.tokens_merged == 4
    assert coverage.other_token == "other"


def test_other_is_the_most_frequent_word_left_out_where_other_is_taken_or_absent():
    counts = torch.tensor([0, 0, 0, 9, 8, 7, 2, 0, 3, 1, 0, 0])
    taken = choose_classes(counts, TEXTS, MEANINGLESS, max_classes=3)  # kept: ".", " other"
    assert taken.class_tokens.tolist() == [3, 4, 8]  # the sign (7 times) is more frequent, but "Fine" says something
    everything_kept = choose_classes(counts, TEXTS, MEANINGLESS, max_classes=100)
    assert everything_kept.class_tokens[-1] == 0  # nothing left out was ever read: the first word of them
    assert everything_kept.coverage.covered == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_are_closed_and_consistent(data):
    size = data.draw(st.integers(2, 14))
    texts = data.draw(st.lists(st.sampled_from([*TEXTS, "a", "B", "b", "C"]), min_size=size, max_size=size))
    flags = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    forms = normal_forms(texts, flags)
    if len(set(forms)) < 2 or not counts.sum():
        return
    limit = data.draw(st.integers(2, 10))
    tables = choose_classes(counts, texts, flags, limit)
    classes = len(tables.class_tokens)
    assert classes <= limit
    check_classes(tables.token_classes, tables.class_tokens, size)
    # every class but the last is one normal form, and one form is never split
    of_class = {}
    for token, index in enumerate(tables.token_classes.tolist()):
        of_class.setdefault(index, set()).add(forms[token])
    assert set(of_class) == set(range(classes))
    assert all(len(of_class[index]) == 1 for index in range(classes - 1))
    assert sum(len(part) for part in of_class.values()) == len(set(forms))
    # no form that was left out is more frequent than one that was kept
    frequency = {form: sum(int(c) for c, f in zip(counts, forms, strict=True) if f == form) for form in set(forms)}
    kept = [frequency[next(iter(of_class[index]))] for index in range(classes - 1)]
    assert min(kept) >= max(frequency[form] for form in of_class[classes - 1]) or len(of_class[classes - 1]) == 1


@pytest.mark.parametrize(
    ("counts", "texts", "flags", "limit", "message"),
    [
        ([1, 1], ["a"], [False], 2, "2, 1, 1"),
        ([1, 1], ["a", "b"], [False, False], 1, "max_classes=1"),
        ([0, 0], ["a", "b"], [False, False], 2, "no readings"),
        ([1, 1], ["a", " A"], [False, False], 2, "same normal form"),
    ],
)
def test_errors(counts, texts, flags, limit, message):
    with pytest.raises(ValueError, match=message):
        choose_classes(torch.tensor(counts), texts, flags, limit)
