"""Token sets against brute force: coverage per pixel, Chebyshev rings, translated copies, seeded draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.analysis.object_tokens import (
    grid_places,
    last_row,
    object_tokens,
    outside_tokens,
    random_tokens,
    translated_control,
    translations,
    with_rings,
)
from dualstream.processing.token_boxes import Block, TokenGeometry


def one_block(rows=6, cols=7, cell=4):
    return TokenGeometry((cols * cell, rows * cell), (Block(rows, cols, 0.0, 0.0, cell, cell),))


def tiles(tile_rows=2, tile_cols=3, side=4, cell=5, thumbnail=True):
    """InternVL's layout: tiles row by row, then a thumbnail of the whole picture."""
    width, height = tile_cols * side * cell, tile_rows * side * cell
    blocks = [
        Block(side, side, c * side * cell, r * side * cell, cell, cell)
        for r in range(tile_rows)
        for c in range(tile_cols)
    ]
    if thumbnail:
        blocks.append(Block(side, side, 0.0, 0.0, width / side, height / side, thumbnail=True))
    return TokenGeometry((width, height), tuple(blocks))


def brute_coverage(geometry, mask, subdivisions=1):
    share = []
    for x1, y1, x2, y2 in geometry.boxes:
        part = mask[round(y1) : round(y2), round(x1) : round(x2)]
        share.append(part.mean() if part.size else 0.0)
    return np.array(share)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_object_tokens_equal_a_per_pixel_count(seed, threshold):
    for geometry in (one_block(), tiles()):
        width, height = geometry.image_size
        mask = np.random.default_rng(seed).random((height, width)) < 0.02 * (seed % 40)
        share = brute_coverage(geometry, mask)
        expected = np.flatnonzero((share > 0) & (share >= threshold - 1e-9))
        assert np.array_equal(object_tokens(geometry, mask=mask, min_coverage=threshold), expected)


def test_box_stands_in_for_a_missing_mask():
    geometry = one_block()
    assert object_tokens(geometry, box=(0, 0, 8, 4)).tolist() == [0, 1]
    mask = np.zeros((24, 28), dtype=bool)
    mask[20:24, 24:28] = True
    assert object_tokens(geometry, mask=mask, box=(0, 0, 8, 4)).tolist() == [41]
    with pytest.raises(ValueError, match="needs a mask or a box"):
        object_tokens(geometry)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rings=st.integers(0, 4))
def test_rings_are_chebyshev_balls(data, rings):
    geometry = one_block()
    tokens = data.draw(st.sets(st.integers(0, len(geometry) - 1), max_size=5))
    rows, cols = 6, 7
    expected = {
        r * cols + c
        for token in tokens
        for r in range(rows)
        for c in range(cols)
        if max(abs(r - token // cols), abs(c - token % cols)) <= rings
    }
    assert set(with_rings(geometry, np.array(sorted(tokens), dtype=int), rings).tolist()) == expected


def test_rings_cross_tiles_and_stay_inside_the_thumbnail():
    geometry = tiles()
    places = grid_places(geometry)
    corner = int(np.flatnonzero((places == (0, 3, 3)).all(1))[0])  # last token of the first of 2 x 3 tiles
    ring = places[with_rings(geometry, np.array([corner]), 1)]
    assert sorted(map(tuple, ring.tolist())) == [(0, r, c) for r in (2, 3, 4) for c in (2, 3, 4)]
    thumbnail = int(np.flatnonzero((places == (1, 0, 0)).all(1))[0])
    assert {tuple(p) for p in places[with_rings(geometry, np.array([thumbnail]), 1)].tolist()} == {
        (1, r, c) for r in (0, 1) for c in (0, 1)
    }
    with pytest.raises(ValueError, match="rings"):
        with_rings(geometry, np.array([0]), -1)
    with pytest.raises(ValueError, match="tokens must lie"):
        with_rings(geometry, np.array([999]), 1)


def test_grid_places_follow_the_tokens_rectangles():
    geometry = tiles()
    for (layer, row, column), box in zip(grid_places(geometry).tolist(), geometry.boxes, strict=True):
        cell_width, cell_height = (5, 5) if not layer else (15, 10)
        assert (column * cell_width, row * cell_height) == (box[0], box[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_translations_are_exactly_the_free_shifts(data):
    geometry = one_block(5, 5)
    tokens = np.array(sorted(data.draw(st.sets(st.integers(0, 24), min_size=1, max_size=4))))
    expected = []
    for down in range(-4, 5):
        for right in range(-4, 5):
            moved = [(t // 5 + down, t % 5 + right) for t in tokens.tolist()]
            if (down or right) and all(0 <= r < 5 and 0 <= c < 5 for r, c in moved):
                copy = sorted(r * 5 + c for r, c in moved)
                if not set(copy) & set(tokens.tolist()):
                    expected.append(copy)
    assert [copy.tolist() for copy in translations(geometry, tokens)] == expected


def test_translated_control_moves_tiles_and_thumbnail_together():
    geometry = tiles()
    places = grid_places(geometry)
    mask = np.zeros(geometry.image_size[::-1], dtype=bool)
    mask[5:12, 3:14] = True
    tokens = object_tokens(geometry, mask=mask)
    copies = translated_control(geometry, tokens, seed=3, draws=5)
    assert len(copies) == 5 and len({tuple(copy) for copy in copies}) == 5
    for copy in copies:
        assert not set(copy.tolist()) & set(tokens.tolist())
        for layer in (0, 1):
            old = places[tokens][places[tokens][:, 0] == layer, 1:]
            new = places[copy][places[copy][:, 0] == layer, 1:]
            assert sorted((old - old.min(0)).tolist()) == sorted((new - new.min(0)).tolist())
        centres = [geometry.boxes[copy][places[copy][:, 0] == layer].reshape(-1, 2).mean(0) for layer in (0, 1)]
        assert np.abs(centres[0] - centres[1]).max() <= 15  # one cell of the thumbnail


def test_a_set_that_fits_nowhere_has_no_control():
    geometry = one_block(3, 3)
    assert translated_control(geometry, np.arange(9)) == []
    assert translations(geometry, np.array([4]), avoid=np.arange(9)) == []


def test_draws_are_seeded_nested_and_differ():
    first, second = random_tokens(60, 10, seed=1, name="a", draws=2)
    assert not np.array_equal(first, second)
    assert all(np.array_equal(a, b) for a, b in zip(random_tokens(60, 10, 1, "a", 2), (first, second), strict=True))
    assert not np.array_equal(random_tokens(60, 10, 2, "a")[0], first)
    assert not np.array_equal(random_tokens(60, 10, 1, "b")[0], first)
    assert set(first.tolist()) < set(random_tokens(60, 20, 1, "a")[0].tolist())
    assert random_tokens(np.array([3, 5]), 10)[0].tolist() == [3, 5]
    assert len(set(first.tolist())) == 10


def test_outside_leaves_out_padding_and_last_row_is_the_prompts_end():
    padded = TokenGeometry((20, 10), (Block(4, 4, 0.0, -5.0, 5, 5),))  # the upper and lower row see only padding
    assert outside_tokens(padded, np.array([4, 5])).tolist() == [6, 7, 8, 9, 10, 11]
    assert last_row(one_block(6, 7)).tolist() == list(range(35, 42))
    assert last_row(tiles()).tolist() == list(range(108, 112))
