"""What's-Up sets: right answers, exact balance inside a set, what one object's position tells, splits, rows."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.data_builders.scenes import SPLIT_SEEDS
from dualstream.data_builders.spatial_sft import (
    AXES,
    FORMS,
    NON_SPATIAL_FEATURES,
    RELATIONS,
    WHATS_UP_FEATURES,
    is_spatial,
    make_set,
    make_sets,
    non_spatial_row,
    split_range,
    whats_up_rows,
)
from dualstream.data_builders.spatial_sft.whats_up import GAP, LETTERS, OFFSET

SEEDS = st.integers(0, 1_200_000_000 - 1)
FAST = settings(max_examples=60, deadline=None)
SETS = 1500


@pytest.fixture(scope="module")
def sets():
    return [make_set(seed) for seed in range(SETS)]


@FAST
@given(SEEDS)
def test_every_picture_shows_its_relation_and_no_other(seed):
    for item, relation in zip(make_set(seed), RELATIONS, strict=True):
        subject, reference = item.scene.objects
        dx, dy = subject.x - reference.x, subject.y - reference.y
        assert item.relation == relation
        seen = {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}
        assert seen[relation]
        along, across = (abs(dx), abs(dy)) if item.axis == "horizontal" else (abs(dy), abs(dx))
        assert along >= subject.radius + reference.radius + GAP - 1e-9
        assert across <= OFFSET * along + 1e-9
        assert all(o.radius <= c <= 1 - o.radius for o in (subject, reference) for c in (o.x, o.y))


@FAST
@given(SEEDS)
def test_nothing_but_the_positions_changes_inside_a_set(seed):
    def looks(item):
        return [(o.shape, o.color, o.texture, o.radius) for o in item.scene.objects]

    first, *others = make_set(seed)
    for item in others:
        assert looks(item) == looks(first)
        assert (item.scene.background, item.scene.clutter) == (first.scene.background, first.scene.clutter)
        assert item.question("word") == first.question("word") and item.question("letter") == first.question("letter")
    for form in FORMS:  # so a reader of the words alone, or of one option, is right exactly once in four
        assert len({item.answer(form) for item in make_set(seed)}) == 4


@FAST
@given(SEEDS)
def test_the_anchor_stands_still_and_each_object_anchors_one_axis(seed):
    items = {item.relation: item for item in make_set(seed)}
    anchors = set()
    for first, second in AXES.values():
        a, b = items[first], items[second]
        assert a.anchor == b.anchor and a.axis == b.axis
        number = ("subject", "reference").index(a.anchor)
        assert a.scene.objects[number] == b.scene.objects[number]
        assert a.scene.objects[1 - number] != b.scene.objects[1 - number]
        anchors.add(a.anchor)
    assert anchors == {"subject", "reference"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_policy_that_sees_one_object_gets_half_of_the_pairs_at_best_and_no_set(sets, number):
    """Exactly, for the best such policy there could be: one that has learnt the answers of these very pictures."""
    answers = {}
    for item in itertools.chain.from_iterable(sets):
        answers.setdefault(item.scene.objects[number], Counter())[item.relation] += 1
    pairs = whole = 0
    for items in sets:
        right = [answers[i.scene.objects[number]].most_common(1)[0][0] == i.relation for i in items]
        pairs += all(right[:2]) + all(right[2:])
        whole += all(right)
    assert pairs <= len(sets)  # of 2 per set
    assert whole == 0


@pytest.mark.parametrize("number", [0, 1])
def test_what_one_position_tells_on_single_pictures_is_limited(sets, number):
    """It cannot be nothing (see the module); the best guess from a fine grid of places stays below one in two."""
    half = 500
    points = np.array([[(o.x, o.y) for i in items for o in i.scene.objects[number : number + 1]] for items in sets])
    labels = np.tile(np.arange(4), (half, 1)).reshape(-1)
    train, test = points[:half].reshape(-1, 2), points[half : 2 * half].reshape(-1, 2)
    distance = ((test[:, None] - train[None]) ** 2).sum(-1)
    votes = labels[np.argpartition(distance, 40, axis=1)[:, :40]]
    guess = (votes[..., None] == np.arange(4)).sum(1).argmax(1)
    accuracy = (guess == labels).mean()
    assert 0.3 < accuracy < 0.5


def test_sizes_shapes_and_roles_are_even_over_the_sets(sets):
    """Any of them is the same in the four pictures of a set; over sets, subject and reference are exchangeable."""
    radii = np.array([[o.radius for o in items[0].scene.objects] for items in sets])
    assert abs((radii[:, 0] > radii[:, 1]).mean() - 0.5) < 3.3 * 0.5 / np.sqrt(len(sets))
    names = [[(o.shape, o.color) for o in items[0].scene.objects] for items in sets]
    assert all(a != b for a, b in names)
    first, second = (Counter(pair[i][0] for pair in names) for i in (0, 1))
    assert all(abs(first[s] - second[s]) < 3.3 * np.sqrt(2 * len(sets) / 8) for s in first)


def test_option_orders_are_uniform(sets):
    counts = Counter(items[0].order for items in sets)
    expected = len(sets) / 24
    assert len(counts) == 24
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 49.7  # 99.9 % point, 23 degrees of freedom
    horizontal = np.mean([items[0].anchor == "subject" for items in sets])
    assert abs(horizontal - 0.5) < 3.3 * 0.5 / np.sqrt(len(sets))


@FAST
@given(SEEDS)
def test_wording_names_each_object_alone_and_letters_point_at_the_true_sentence(seed):
    for item in make_set(seed):
        subject, reference = item.scene.objects
        for phrase, own, other in ((item.subject, subject, reference), (item.reference, reference, subject)):
            words = set(phrase.split()) - {"object"}
            assert words <= {own.shape, own.color}
            assert not words <= {other.shape, other.color}
        assert is_spatial(item.question("word"), item.answer("word"))
        sentence = item.options()[LETTERS.index(item.answer("letter"))]
        assert f" is {item.relation} " in sentence
        assert f"{item.answer('letter')}. {sentence}" in item.question("letter").split("\n")
    with pytest.raises(ValueError, match="word, letter"):
        item.question("number")


def test_the_same_seed_gives_the_same_rows_and_pictures_show_the_boxes():
    rows = whats_up_rows(11, size=64)
    assert rows == whats_up_rows(11, size=64)
    assert rows != whats_up_rows(12, size=64)
    for row in rows:
        decoded = WHATS_UP_FEATURES.decode_example(WHATS_UP_FEATURES.encode_example(row))
        assert decoded["images"][0].size == (64, 64)
        s, r = row["subject_box"], row["reference_box"]
        apart = {"left": s[2] <= r[0], "right": r[2] <= s[0], "above": s[3] <= r[1], "below": r[3] <= s[1]}
        assert [name for name, true in apart.items() if true] == [row["relation"]]
        user, assistant = row["messages"]
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert assistant["content"][0]["text"] == row["answer"] == row["relation"]


def test_pairs_and_sets_are_complete():
    rows = [row for seed in range(20) for row in whats_up_rows(seed, size=32)]
    assert set(Counter(row["set_id"] for row in rows).values()) == {4}
    assert set(Counter(row["pair_id"] for row in rows).values()) == {2}
    relations = {}
    for row in rows:
        relations.setdefault(row["pair_id"], set()).add(row["relation"])
    assert {frozenset(pair) for pair in relations.values()} == {frozenset(pair) for pair in AXES.values()}


def test_splits_share_no_seed_and_refuse_what_they_do_not_have():
    ranges = [split_range(split, 0, 1000) for split in SPLIT_SEEDS]
    assert all(set(a).isdisjoint(b) for a, b in itertools.combinations(ranges, 2))
    with pytest.raises(ValueError, match="train, validation, test"):
        split_range("dev", 0, 1)
    with pytest.raises(ValueError, match="has 100000000"):
        split_range("test", 0, 10**9)
    assert [seed for seed, _ in make_sets(range(3, 5))] == [3] * 4 + [4] * 4


def test_non_spatial_rows_ask_for_no_place_and_mix_their_kinds():
    rows = [non_spatial_row(seed, size=32) for seed in range(150)]
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"presence", "attribute", "count"} and min(kinds.values()) > 30
    for row in rows:
        NON_SPATIAL_FEATURES.encode_example(row)
        assert not is_spatial(row["messages"][0]["content"][1]["text"], row["answer"])
