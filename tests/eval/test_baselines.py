"""Rules of the baselines against loops written from their descriptions, on grids of any shape."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.eval.baselines import (
    DROPPED,
    grouped_plan,
    matched_tokens,
    merged_neighbours,
    pooled_windows,
    random_cells,
    strided_cells,
)

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def features_of(height, width, seed=0):
    return np.random.default_rng(seed).normal(size=(height * width, 5)).astype(np.float32)


def partition(group):
    """Groups as a set of sets of cells, dropped cells left out."""
    return {frozenset(np.flatnonzero(group == name).tolist()) for name in set(group.tolist()) - {DROPPED}}


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.data())
def test_every_budgeted_rule_keeps_exactly_its_number(shape, data):
    height, width = shape
    keep = data.draw(st.integers(1, height * width))
    features = features_of(height, width, seed=keep)
    for rule in (random_cells, strided_cells, merged_neighbours, matched_tokens):
        group = rule(features, height, width, keep, np.random.default_rng(0))
        assert group.shape == (height * width,)
        assert len(partition(group)) == keep
        if rule in (merged_neighbours, matched_tokens):
            assert (group != DROPPED).all()
        if keep == height * width:
            assert all(len(cells) == 1 for cells in partition(group))


def test_random_cells_are_uniform():
    rng = np.random.default_rng(0)
    counts = sum((random_cells(features_of(3, 4), 3, 4, 4, rng) != DROPPED).astype(int) for _ in range(3000))
    assert abs(counts / 3000 - 4 / 12).max() < 5 * np.sqrt(2 / 9 / 3000)


@given(SHAPES, st.data())
def test_stride_leaves_gaps_that_differ_by_one_at_most(shape, data):
    cells = shape[0] * shape[1]
    keep = data.draw(st.integers(1, cells))
    kept = np.flatnonzero(strided_cells(features_of(*shape), *shape, keep, np.random.default_rng(0)) != DROPPED)
    if keep > 1:
        assert set(np.diff(kept)) <= {cells // keep, -(-cells // keep)}
    assert kept[0] <= cells / keep / 2
    assert cells - kept[-1] >= cells / keep / 2  # as far from the end as from the start


def neighbours_by_loop(features, height, width, keep):
    region = {cell: frozenset([cell]) for cell in range(height * width)}
    pairs = []
    for row, column in itertools.product(range(height), range(width)):
        for down, right in ((0, 1), (1, 0)):
            if row + down < height and column + right < width:
                one, other = row * width + column, (row + down) * width + column + right
                pairs.append((cosine(features[one], features[other]), one, other))
    for _, one, other in sorted(pairs, reverse=True):
        if len(set(region.values())) == keep:
            break
        union = region[one] | region[other]
        region.update(dict.fromkeys(union, union))
    return set(region.values())


def tome_by_loop(features, keep):
    tokens = [[cell] for cell in range(len(features))]
    while len(tokens) > keep:
        mean = [features[cells].astype(np.float64).mean(0) for cells in tokens]
        choice = []
        for source in range(0, len(tokens), 2):
            alike = [(cosine(mean[source], mean[target]), target) for target in range(1, len(tokens), 2)]
            choice.append((*max(alike), source))
        gone = set()
        for _, target, source in sorted(choice, reverse=True)[: len(tokens) - keep]:
            tokens[target] = tokens[target] + tokens[source]
            gone.add(source)
        tokens = [cells for index, cells in enumerate(tokens) if index not in gone]
    return {frozenset(cells) for cells in tokens}


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.data())
def test_merging_follows_its_description(shape, data):
    height, width = shape
    keep = data.draw(st.integers(1, height * width))
    features, rng = features_of(height, width, seed=keep), np.random.default_rng(0)
    merged = partition(merged_neighbours(features, height, width, keep, rng))
    assert merged == neighbours_by_loop(features, height, width, keep)
    assert partition(matched_tokens(features, height, width, keep, rng)) == tome_by_loop(features, keep)


def test_merging_of_equal_cells_keeps_the_number_too():
    features, rng = np.ones((12, 5), dtype=np.float32), np.random.default_rng(0)
    for rule in (merged_neighbours, matched_tokens):
        assert len(partition(rule(features, 3, 4, 5, rng))) == 5


@pytest.mark.parametrize(("height", "width", "size"), [(4, 4, 2), (3, 5, 2), (1, 6, 2), (7, 5, 3), (1, 1, 2)])
def test_windows_on_odd_grids(height, width, size):
    group = pooled_windows(size)(features_of(height, width), height, width, 0, np.random.default_rng(0))
    expected = {}
    for row, column in itertools.product(range(height), range(width)):
        expected.setdefault((row // size, column // size), set()).add(row * width + column)
    assert partition(group) == set(map(frozenset, expected.values()))


def anchor_by_loop(cells, width):
    row, column = (sum(values) / len(cells) for values in zip(*(divmod(cell, width) for cell in cells), strict=True))
    return min(cells, key=lambda cell: (round((cell // width - row) ** 2 + (cell % width - column) ** 2, 9), cell))


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPES, min_size=0, max_size=3), st.integers(0, 99))
def test_plan_of_groups(shapes, seed):
    rng = np.random.default_rng(seed)
    groups = [rng.integers(DROPPED, 4, size=height * width) for height, width in shapes]
    plan = grouped_plan(groups, [list(shape) for shape in shapes])
    anchors, segment, run, first = [], [], [], 0
    for (_, width), group in zip(shapes, groups, strict=True):
        cells = {anchor_by_loop(sorted(members), width): members for members in partition(group)}
        place = {cell: index for index, anchor in enumerate(sorted(cells)) for cell in cells[anchor]}
        segment += [place[cell] + len(anchors) if cell in place else -1 for cell in range(len(group))]
        anchors += [first + anchor for anchor in sorted(cells)]
        names = [name if name != DROPPED else ("dropped", cell) for cell, name in enumerate(group.tolist())]
        known = {name: index for index, name in enumerate(dict.fromkeys(names))}
        before = max(run, default=-1) + 1
        run += [known[name] + before for name in names]
        first += len(group)
    assert plan.anchor.tolist() == anchors
    assert plan.segment.tolist() == segment
    assert plan.run.tolist() == run
    assert plan.kept_per_block.tolist() == [len(partition(group)) for group in groups]
    assert all(value.dtype == torch.long for value in (plan.anchor, plan.segment, plan.run, plan.kept_per_block))
