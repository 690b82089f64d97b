"""Token rectangles against per-pixel brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.processing.token_boxes import SLIVER, Block, TokenGeometry


@st.composite
def geometries(draw) -> TokenGeometry:
    """Small images with one or two blocks, cells of any size, partly outside the image."""
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    length = st.floats(0.2, 6)
    blocks = []
    for thumbnail in (False, True)[: draw(st.integers(1, 2))]:
        rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        left, top = draw(st.floats(-4, 4)), draw(st.floats(-4, 4))
        blocks.append(Block(rows, cols, left, top, draw(length), draw(length), thumbnail))
    return TokenGeometry(size, tuple(blocks))


def overlap(box: np.ndarray, other: tuple[float, float, float, float]) -> float:
    """Area shared by two rectangles."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**32 - 1), st.booleans())
def test_mask_coverage_equals_a_loop_over_pixels(geometry: TokenGeometry, seed: int, soft: bool) -> None:
    width, height = geometry.image_size
    mask = np.random.default_rng(seed).random((height, width))
    mask = mask if soft else mask > 0.5
    expected = np.zeros(len(geometry))
    for token, box in enumerate(geometry.boxes):
        covered = sum(mask[i, j] * overlap(box, (j, i, j + 1, i + 1)) for i in range(height) for j in range(width))
        area = overlap(box, (0, 0, width, height))
        expected[token] = covered / area if area >= SLIVER else 0.0
    np.testing.assert_allclose(geometry.coverage_of_mask(mask), expected, atol=1e-13 / SLIVER)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.tuples(*[st.floats(-2, 14)] * 4))
def test_box_coverage_equals_the_shared_area(geometry: TokenGeometry, numbers: tuple[float, ...]) -> None:
    x1, x2 = sorted(numbers[:2])
    y1, y2 = sorted(numbers[2:])
    box = (x1, y1, x2, y2)
    expected = [overlap(b, box) / area if area else 0 for b, area in zip(geometry.boxes, geometry.areas, strict=True)]
    np.testing.assert_allclose(geometry.coverage_of_box(box), expected, atol=1e-9)
    assert geometry.tokens_of_box(box).tolist() == [token for token, share in enumerate(expected) if share > 0]


@settings(max_examples=60, deadline=None)
@given(geometries(), st.data())
def test_a_box_of_whole_pixels_is_the_mask_of_those_pixels(geometry: TokenGeometry, data) -> None:
    width, height = geometry.image_size
    x1, y1 = data.draw(st.integers(0, width)), data.draw(st.integers(0, height))
    x2, y2 = data.draw(st.integers(x1, width)), data.draw(st.integers(y1, height))
    mask = np.zeros((height, width), dtype=bool)
    mask[y1:y2, x1:x2] = True
    big = geometry.areas > 1e-6
    by_mask, by_box = geometry.coverage_of_mask(mask), geometry.coverage_of_box((x1, y1, x2, y2))
    np.testing.assert_allclose(by_mask[big], by_box[big], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.floats(-1, 13), st.floats(-1, 13), st.booleans())
def test_the_token_at_a_point_is_the_one_whose_box_holds_it(geometry, x: float, y: float, thumbnail: bool) -> None:
    width, height = geometry.image_size
    token = geometry.token_at(x, y, thumbnail)
    inside = 0 <= x < width and 0 <= y < height
    holders = [
        index
        for index, (x1, y1, x2, y2) in enumerate(geometry.boxes)
        if inside and x1 <= x < x2 and y1 <= y < y2 and geometry.is_thumbnail[index] == thumbnail
    ]
    if token is None:
        assert not holders
    elif holders:  # on an edge, rounding may choose either neighbour
        x1, y1, x2, y2 = geometry.boxes[token]
        assert token in holders or min(abs(x - x1), abs(x - x2), abs(y - y1), abs(y - y2)) < 1e-6


@settings(max_examples=30, deadline=None)
@given(geometries())
def test_places_and_boxes_follow_the_blocks(geometry: TokenGeometry) -> None:
    token = 0
    width, height = geometry.image_size
    for number, block in enumerate(geometry.blocks):
        for row in range(block.rows):
            for col in range(block.cols):
                x1, y1 = block.left + col * block.cell_width, block.top + row * block.cell_height
                box = np.clip([x1, y1, x1 + block.cell_width, y1 + block.cell_height], 0, [width, height] * 2)
                assert geometry.places[token].tolist() == [number, row, col]
                np.testing.assert_allclose(geometry.boxes[token], box, atol=1e-12)
                assert geometry.is_thumbnail[token] == block.thumbnail
                token += 1
    assert token == len(geometry) == len(geometry.polygons)
    assert TokenGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_thumbnail_tokens_can_be_left_out() -> None:
    tile, small = Block(2, 2, 0, 0, 4, 4), Block(2, 2, 0, 0, 4, 4, thumbnail=True)
    geometry = TokenGeometry((8, 8), (tile, small))
    assert geometry.tokens_of_box((0, 0, 1, 1)).tolist() == [0, 4]
    assert geometry.tokens_of_box((0, 0, 1, 1), thumbnail=False).tolist() == [0]
    mask = np.zeros((8, 8), dtype=bool)
    mask[:3] = True
    assert geometry.tokens_of_mask(mask, min_coverage=0.75, thumbnail=False).tolist() == [0, 1]
    assert geometry.tokens_of_mask(mask, min_coverage=0.76).tolist() == []
    assert (geometry.token_at(7, 7), geometry.token_at(7, 7, thumbnail=True)) == (3, 7)


def test_polygons_go_round_the_box() -> None:
    geometry = TokenGeometry((4, 4), (Block(1, 1, 1, 2, 2, 1),))
    assert geometry.polygons.tolist() == [[[1, 2], [3, 2], [3, 3], [1, 3]]]


def test_wrong_arguments_are_named() -> None:
    geometry = TokenGeometry((4, 3), (Block(1, 1, 0, 0, 4, 3),))
    with pytest.raises(ValueError, match=r"\(height, width\) = \(3, 4\), got \(4, 3\)"):
        geometry.coverage_of_mask(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="x1 <= x2"):
        geometry.coverage_of_box((3, 0, 1, 1))
    with pytest.raises(ValueError, match="min_coverage"):
        geometry.tokens_of_box((0, 0, 1, 1), min_coverage=2)
    with pytest.raises(ValueError, match="positive size"):
        Block(0, 1, 0, 0, 1, 1)


def test_rounding_covers_no_token_far_from_the_object() -> None:
    """On cells of 17.8 pixels the summed areas of a mask leave 1e-11 at tokens that it does not touch."""
    geometry = TokenGeometry((640, 427), (Block(24, 24, 105.60636182902584, 0.0, 17.813121272365805, 427 / 24),))
    mask = np.zeros((427, 640), dtype=bool)
    mask[141:173, 450:509] = True
    mask[150:160, 470:480] = False
    x1, y1, x2, y2 = geometry.boxes.T
    near = (x2 > 450) & (x1 < 509) & (y2 > 141) & (y1 < 173)
    assert set(geometry.tokens_of_mask(mask)) <= set(np.flatnonzero(near))
