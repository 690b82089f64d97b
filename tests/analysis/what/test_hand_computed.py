"""Emergence, the two ratios, presence and regions on grids small enough to count by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.analysis.what.emergence import best_step, count_hits, emergence, hits_with_control
from dualstream.analysis.what.grid_objects import GridObjects, label_pixels, objects_on_grid
from dualstream.analysis.what.labels import make_schema
from dualstream.analysis.what.presence import always_no, answer, ask, auroc, presence_figures
from dualstream.analysis.what.segmentation import (
    cells_to_pixels,
    fill_holes,
    majority_cells,
    mean_iou,
    overlap,
    paint,
)
from dualstream.analysis.what.stages import (
    change_point,
    graded,
    judge,
    object_ratios,
    ratios_with_control,
    with_interval,
)
from dualstream.analysis.what.vocabulary import make_vocabulary
from dualstream.processing.token_boxes import Block, TokenGeometry

SCHEMA = make_schema(
    {
        "name": "test",
        "labels": {"bear": {"keywords": ["bear"], "synonyms": ["grizzly"]}, "log": {"keywords": ["log"]}},
        "attributes": {"color": ["brown", "black"]},
    }
)
PIECES = (" bear", " grizzly", " log", " brown", " black", ".", " sky")
VOCABULARY = make_vocabulary(PIECES, SCHEMA)
BEAR, GRIZZLY, LOG, BROWN, BLACK, DOT, SKY = range(7)


def grid(rows=2, columns=4, cell=10):
    return TokenGeometry((columns * cell, rows * cell), (Block(rows, columns, 0.0, 0.0, cell, cell),))


def picture(*objects, name="a", size=(40, 20)):
    return AnnotatedImage(name, objects, lambda: None, size)


def bear(box, *attributes, **options):
    return AnnotatedObject("bear", box, attributes, **options)


# A bear over the two left columns and a log over the right one; the third column is empty.
TWO = picture(bear((0, 0, 20, 20), "brown"), AnnotatedObject("log", (30, 0, 40, 20)))
WORDS = np.array([[BEAR, BROWN, SKY, LOG, GRIZZLY, DOT, BEAR, BEAR], [DOT] * 8])


def test_objects_on_the_grid():
    objects = objects_on_grid(TWO, grid(), VOCABULARY)
    assert objects.in_box.tolist() == [[True, True, False, False] * 2, [False, False, False, True] * 2]
    assert np.array_equal(objects.cells, objects.in_box)
    assert objects.label.tolist() == [0, 1]
    assert [VOCABULARY.words[i] for i in np.flatnonzero(objects.own_attributes[0])] == ["brown"]
    assert [VOCABULARY.words[i] for i in np.flatnonzero(objects.own_names[0])] == ["bear", "grizzly"]


def test_a_small_object_keeps_its_best_cell_and_a_mask_goes_before_the_box():
    mask = np.zeros((20, 40), bool)
    mask[12:16, 12:15] = True
    objects = objects_on_grid(picture(bear((0, 0, 20, 20), read_mask=lambda: mask)), grid(), VOCABULARY)
    assert np.flatnonzero(objects.cells[0]).tolist() == [5]
    assert np.flatnonzero(objects.in_box[0]).tolist() == [0, 1, 4, 5]


def test_emergence_counts_words_inside_the_right_box():
    objects = objects_on_grid(TWO, grid(), VOCABULARY)
    hits, cells = count_hits(VOCABULARY.label[WORDS], objects, objects.label)
    assert hits.tolist() == [3, 0]  # bear, grizzly in the bear's box, log in the log's; "bear" at 6 and 7 is elsewhere
    assert cells == 6


def test_overlapping_objects_of_one_name_count_a_cell_once():
    twice = picture(bear((0, 0, 20, 20)), bear((0, 0, 30, 20)))
    objects = objects_on_grid(twice, grid(), VOCABULARY)
    hits, cells = count_hits(VOCABULARY.label[np.full((1, 8), BEAR)], objects, objects.label)
    assert (hits.tolist(), cells) == ([6], 6)


def many(count=60, seed=0):
    """Random labels on random cells: nothing to find."""
    rng = np.random.default_rng(seed)
    said, objects = [], []
    for number in range(count):
        left = 10 * int(rng.integers(0, 3))
        name = ("bear", "log")[rng.integers(0, 2)]
        image = picture(AnnotatedObject(name, (left, 0, left + 20, 20), ("brown",)), name=str(number))
        objects.append(objects_on_grid(image, grid(), VOCABULARY))
        said.append(rng.integers(0, 7, (2, 8)))
    return said, objects


def test_random_words_are_at_chance_and_true_ones_are_not():
    said, objects = many()
    labels = [VOCABULARY.label[words] for words in said]
    found = emergence(hits_with_control(labels, objects))
    for gain in found["gain"]:
        assert gain.low <= 0 <= gain.high
    true = [np.repeat(np.where(item.in_box.any(0), item.label[0], -1)[None], 2, 0) for item in objects]
    right = emergence(hits_with_control(true, objects))
    assert right["emergence"][0].value == 1.0
    assert right["gain"][0].low > 0.3


def test_the_deepest_of_equal_steps_is_chosen():
    objects = [
        objects_on_grid(TWO, grid(), VOCABULARY),
        objects_on_grid(picture(bear((0, 0, 9, 9))), grid(), VOCABULARY),
    ]
    words = np.array([[DOT] * 8, [BEAR] * 8, [BEAR] * 8])
    counted = hits_with_control([VOCABULARY.label[words]] * 2, objects)
    assert best_step(counted) == 2
    with pytest.raises(ValueError, match="at least two pictures"):
        hits_with_control([VOCABULARY.label[words]], objects[:1])


def test_ratios_of_attributes_and_names_by_hand():
    objects = objects_on_grid(TWO, grid(), VOCABULARY)
    said = VOCABULARY.word[WORDS]
    ratios = object_ratios(said, objects.cells[0], objects.own_attributes[0], objects.own_names[0])
    assert ratios.tolist() == [[0.25, 0.0], [0.5, 0.0]]  # cells: bear, brown, grizzly, "."
    ratios = object_ratios(said, objects.cells[1], objects.own_attributes[1], objects.own_names[1])
    assert ratios.tolist() == [[0.0, 0.0], [0.5, 0.0]]  # log, bear


def test_a_word_that_is_both_counts_as_attribute():
    words = np.array([True, False])
    assert object_ratios(np.array([[0, 1, -1, 0]]), np.ones(4, bool), words, words).tolist() == [[0.5], [0.0]]


def test_ratios_average_objects_and_their_control_is_at_chance():
    said, objects = many(200)
    found = ratios_with_control([VOCABULARY.word[words] for words in said], objects)
    names = np.array([item.representative.mean() for item in found])
    control = np.array([item.representative_control.mean() for item in found])
    assert abs(names.mean() - control.mean()) < 2.5 * (names - control).std() / np.sqrt(len(names)) + 1e-9
    two = [objects_on_grid(TWO, grid(), VOCABULARY)] * 2
    both = ratios_with_control([VOCABULARY.word[WORDS]] * 2, two)[0]
    assert both.attribute.tolist() == [0.125, 0.0] and both.representative.tolist() == [0.5, 0.0]


def test_graded_figures_compare_with_rivals_of_the_same_kind():
    objects = objects_on_grid(TWO, grid(), VOCABULARY)
    tracked = np.zeros((1, 8, 3))  # bear, log, brown, no rival of its kind
    tracked[0, [0, 1, 4, 5], 0] = 2.0  # bear on the bear
    tracked[0, [3, 7], 1] = 4.0
    own = np.array([[True, False, True], [False, True, False]])
    labels, colors = np.array([True, True, False]), np.array([False, False, True])
    assert graded(tracked, objects, own, [labels]).tolist() == [3.0]
    assert graded(tracked, objects, own, [colors]) is None


@given(st.integers(1, 7), st.floats(0.1, 1), st.floats(-0.02, 0.02))
def test_the_change_point_is_the_step(place, height, slope):
    curve = np.where(np.arange(8) >= place, height, 0.0) + slope * np.arange(8) / 8
    assert change_point(curve) == place


def test_two_stages_are_told_from_one():
    rng = np.random.default_rng(0)
    x = np.arange(8)
    attribute = np.exp(-((x - 2) ** 2)) + rng.normal(0, 0.1, (80, 8))
    name = (x >= 5) + rng.normal(0, 0.1, (80, 8))
    assert with_interval(attribute, "peak").value == 2 and with_interval(name, "change").value == 5
    verdict = judge(attribute, name, range(8), 2, 7)
    assert verdict.holds and not verdict.fails and verdict.lead.value == 3
    together = judge(name, name, range(8), 7, 7)
    assert together.fails and not together.holds
    nothing = judge(np.zeros((80, 8)), name, range(8), 0, 7)
    assert nothing.fails  # no attribute is ever said
    noise = judge(rng.normal(0, 0.1, (80, 8)), name, range(8), 2, 7)
    assert not noise.holds


def test_questions_are_balanced_and_drawn_by_picture_and_seed():
    labels, truth = ask("p", np.array([3, 3, 1]), np.arange(8))
    assert sorted(labels[truth]) == [1, 3] and not set(labels[~truth]) & {1, 3} and truth.sum() * 2 == len(truth)
    assert np.array_equal(ask("p", np.array([3, 1]), np.arange(8))[0], labels)
    assert len({tuple(ask("p", np.array([3]), np.arange(8), seed)[0]) for seed in range(20)}) > 3
    assert len(ask("p", np.arange(8), np.arange(8))[0]) == 0
    assert len(ask("p", np.array([-1]), np.arange(8))[0]) == 0


def test_presence_by_hand():
    said = np.array([[[0, 1, -1], [-1, -1, 2]]])  # one step, two cells, three readings
    log_probs = np.log(np.array([[[0.6, 0.3, 0.05, 0.01], [0.1, 0.2, 0.4, 0.02]]]))
    found = answer(said, log_probs, np.array([0, 1, 2, 3]), np.array([True, True, False, False]))
    assert found.strict.tolist() == [[True, False, False, False]]
    assert found.loose.tolist() == [[True, True, True, False]]
    assert np.exp(found.score).round(6).tolist() == [[0.6, 0.3, 0.4, 0.02]]
    assert auroc(found.score[0], found.truth) == 0.75
    figures = presence_figures([found])[0]
    assert figures["strict"]["sensitivity"].value == 0.5 and figures["strict"]["specificity"].value == 1.0
    assert figures["loose"]["sensitivity"].value == 1.0 and figures["loose"]["specificity"].value == 0.5
    assert figures["strict"]["accuracy"].value == 0.75 and always_no([found]) == 0.5
    with pytest.raises(ValueError, match="loose rule needs 3"):
        answer(said[..., :2], log_probs, np.arange(4), np.ones(4, bool))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_ordered_pairs(items):
    score, truth = (np.array(column) for column in zip(*items, strict=True))
    if truth.all() or not truth.any():
        with pytest.raises(ValueError, match="needs both answers"):
            auroc(score, truth)
        return
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth] for b in score[~truth]]
    assert auroc(score, truth) == pytest.approx(np.mean(pairs))


def test_random_scores_and_shuffled_answers_are_at_chance():
    rng = np.random.default_rng(0)
    answers = [
        answer(rng.integers(-1, 8, (1, 9, 3)), rng.normal(size=(1, 9, 4)), rng.permutation(8)[:4], np.arange(4) < 2)
        for _ in range(80)
    ]
    figures = presence_figures(answers)[0]
    for name in ("auroc", "auroc_control"):
        assert figures[name].low < 0.5 < figures[name].high
    shares = figures["strict"]
    assert abs(shares["sensitivity"].value + shares["specificity"].value - 1) < 0.15


def fill_slowly(labels, rows, columns, count):
    """The rules, cell by cell."""
    table = np.array(labels).reshape(rows, columns)
    filled = table.copy()
    for y in range(rows):
        for x in range(columns):
            if table[y, x] >= 0:
                continue
            votes, edges, total = np.zeros(count), np.zeros(count), 0.0
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if (dy or dx) and 0 <= y + dy < rows and 0 <= x + dx < columns:
                        weight = 1.0 if not (dy and dx) else 0.5
                        total += weight
                        if table[y + dy, x + dx] >= 0:
                            votes[table[y + dy, x + dx]] += weight
                            edges[table[y + dy, x + dx]] += weight == 1.0
            best = max(range(count), key=lambda label: (votes[label], edges[label], -label))
            filled[y, x] = best if votes[best] > 0.5 * total else -1
    return filled.reshape(-1).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_filling_is_the_rule_cell_by_cell(rows, columns, seed):
    labels = np.random.default_rng(seed).integers(-1, 3, rows * columns)
    assert fill_holes(labels, [(rows, columns)], 3).tolist() == fill_slowly(labels, rows, columns, 3)


def test_holes_are_filled_block_by_block_and_regions_do_not_grow():
    ring = np.array([0, 0, 0, 0, -1, 0, 0, 0, 0])
    assert fill_holes(ring, [(3, 3)], 1).tolist() == [0] * 9
    spot = np.full(9, -1)
    spot[4] = 0
    assert fill_holes(spot, [(3, 3)], 1).tolist() == spot.tolist()
    both = np.concatenate([ring, spot])
    assert fill_holes(np.stack([both, both]), [(3, 3), (3, 3)], 1).tolist() == [[0] * 9 + spot.tolist()] * 2


def test_cells_spread_over_the_pixels_they_look_at():
    geometry = TokenGeometry((30, 10), (Block(1, 2, 5.0, 0.0, 10.0, 10.0), Block(1, 1, 0, 0, 30, 10, thumbnail=True)))
    pixels = cells_to_pixels(np.array([3, 4, 9]), geometry)
    assert pixels.shape == (10, 30)
    assert pixels[0].tolist() == [-1] * 5 + [3] * 10 + [4] * 10 + [-1] * 5


def test_overlap_and_mean_iou_by_hand():
    truth = np.array([[0, 0, 1, -1]])
    said = np.array([[0, 1, 1, -1]])
    counts = np.array([[True, True, True, True]])
    found = overlap(said, truth, counts, 2)
    assert found.intersection.tolist() == [1, 1, 1] and found.union.tolist() == [2, 2, 1]
    scores = mean_iou([found, found])
    assert scores["miou"].value == 0.5 and scores["iou"] == [0.5, 0.5]
    ignored = overlap(said, truth, np.array([[True, False, True, True]]), 2)
    assert mean_iou([ignored])["miou"].value == 1.0


def test_the_best_map_of_a_grid_and_the_truth_of_pixels():
    crowd = AnnotatedObject("log", (30, 0, 40, 20), is_crowd=True)
    image = picture(
        bear((0, 0, 20, 20)), crowd, AnnotatedObject("log", (0, 0, 10, 10)), AnnotatedObject("fog", (20, 0, 25, 5))
    )
    truth, counts = label_pixels(image, SCHEMA, (40, 20))
    assert truth[0, 0] == 1 and truth[15, 5] == 0 and truth[0, 29] == -1  # small before large
    assert not counts[0, 35] and not counts[0, 22] and counts[0, 28]
    assert majority_cells(truth, counts, grid(), 2).tolist() == [1, 0, -1, -1, 0, 0, -1, -1]
    assert paint(np.array([[-1, 0]]), SCHEMA).tolist() == [[[0xED] * 3, [0x44, 0x77, 0xAA]]]


def test_unknown_names_have_no_label_and_crowds_are_not_measured():
    image = picture(AnnotatedObject("fog", (0, 0, 20, 20)), bear((0, 0, 40, 20), is_crowd=True))
    objects = objects_on_grid(image, grid(), VOCABULARY)
    assert isinstance(objects, GridObjects) and objects.label.tolist() == [-1, 0]
    assert objects.known.tolist() == [False, False]
    assert len(ratios_with_control([VOCABULARY.word[WORDS]] * 3, [objects, *many(2)[1]])) == 2
