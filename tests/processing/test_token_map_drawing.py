"""Pictures and pages of token maps: what is drawn where, for tiny and huge images, tiles and every script."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dualstream.processing.lettering import NAMED, NEUTRAL, PALETTE, Lettering, colours_of
from dualstream.processing.token_boxes import Block, TokenGeometry
from dualstream.processing.token_map import TokenMap
from dualstream.processing.token_map_image import CELL_WIDTH, MARGIN, run_parts, word_colours

PIECES = {0: " sky", 1: " dog", 2: ",", 3: " 天空", 4: "</script><b>&", 5: "\n", 6: "photographers"}


def make_map(size=(80, 40), blocks=None, ids=None, image=True, **more) -> TokenMap:
    blocks = blocks or (Block(2, 4, 0, 0, size[0] / 4, size[1] / 2),)
    grids = tuple((block.rows, block.cols) for block in blocks)
    total = sum(rows * cols for rows, cols in grids)
    ids = np.arange(total) % len(PIECES) if ids is None else np.array(ids)
    picture = Image.new("RGB", size, (10, 200, 30)) if image else None
    return TokenMap(ids[:, None], PIECES, grids, geometry=TokenGeometry(size, blocks), image=picture, **more)


def colour_near(page: Image.Image, x: float, y: float) -> np.ndarray:
    return np.asarray(page.crop((round(x) - 2, round(y) - 2, round(x) + 3, round(y) + 3)), dtype=float).mean((0, 1))


@pytest.mark.parametrize("size", [(80, 40), (3, 2), (1, 90), (4000, 2500), (20, 2000)])
@pytest.mark.parametrize("image", [True, False])
def test_any_size_is_drawn_within_the_limit(size: tuple[int, int], image: bool) -> None:
    page = make_map(size, image=image).to_image(max_side=900, title="A title")
    assert page.mode == "RGB"
    assert page.height < 1300 and page.width <= 900 + 2 * MARGIN


def test_a_cell_is_tinted_with_its_words_colour_and_a_dropped_one_is_dark() -> None:
    ids = [0, 0, 0, 0, 1, 1, 2, 2]
    run = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    token_map = make_map(ids=ids, run=run, anchor=np.array([1, 4]))
    page = token_map.to_image()
    cell = CELL_WIDTH  # the cells are square
    sky, dog, dropped = (
        colour_near(page, MARGIN + (col + 0.5) * cell, MARGIN + (row + 0.2) * cell)
        for row, col in [(0, 0), (1, 0), (1, 3)]
    )
    grey = np.array([10, 200, 30]) * 0.35 + 80 * 0.65
    colours = word_colours(token_map)
    np.testing.assert_allclose(sky, grey * 0.5 + np.array(colours["sky"]) * 0.5, atol=2)
    np.testing.assert_allclose(dog, grey * 0.5 + np.array(colours["dog"]) * 0.5, atol=2)
    assert dropped.max() < 60
    assert colours["sky"] == PALETTE[0] and colours[","] == NEUTRAL


def test_cells_outside_every_token_are_dark() -> None:
    page = make_map((80, 40), (Block(2, 2, 20, 0, 20, 20),)).to_image()
    assert colour_near(page, MARGIN + 10, MARGIN + 40).max() < 80


def test_runs_are_outlined_as_one_box() -> None:
    ids = [0, 0, 0, 1, 1, 1, 0, 0]
    token_map = make_map(ids=ids, run=np.array([0, 0, 0, 1, 1, 1, 2, 2]), anchor=np.array([1, 4, 6]))
    assert run_parts(token_map) == [[0, 1, 2], [3], [4, 5], [6, 7]]  # the second run wraps over the row
    page = np.asarray(token_map.to_image(), dtype=int)
    row = page[MARGIN + round(CELL_WIDTH * 0.2)]
    inside = row[MARGIN + CELL_WIDTH - 4 : MARGIN + CELL_WIDTH + 4].sum(axis=1).min()
    between = row[MARGIN + 3 * CELL_WIDTH - 4 : MARGIN + 3 * CELL_WIDTH + 4]
    assert inside > 250  # no dark rim within the run
    assert between.sum(axis=1).min() < 300 and between.sum(axis=1).max() > 660  # dark rim and white line


def test_a_thumbnail_gets_its_own_panel() -> None:
    tiles = (Block(2, 2, 0, 0, 20, 20), Block(2, 2, 40, 0, 20, 20))
    alone = make_map((80, 40), tiles).to_image()
    both = make_map((80, 40), (*tiles, Block(2, 2, 0, 0, 40, 20, thumbnail=True))).to_image()
    assert both.height > alone.height + 50


def test_every_script_and_control_character_is_drawable() -> None:
    letters = Lettering()
    for text in ("dog", "é", "天空", "\U0001f600", "␣", "∅", r"\n", "\u0e01", "한"):
        spelled, font = letters.spell(text)
        assert spelled
        assert letters.fit(text, 400, 60, 24) is not None
    assert Lettering().fit("dog", 4, 60, 24) is None  # no room for one letter
    assert letters.fit("dog", 60, 3, 24) is None
    text, font = letters.fit("photographers", 40, 40, 20, smallest=11)
    assert text.endswith("…") and font.size == 11
    with pytest.raises(ValueError, match="cannot be read"):
        Lettering("absent.ttf")


def test_letters_no_font_has_are_spelled_out(monkeypatch) -> None:
    monkeypatch.setattr("dualstream.processing.lettering._SYSTEM_FONTS", ())
    assert Lettering().spell("天") == ("U+5929", None)
    assert Lettering().spell("ré") == ("re", None)
    assert Lettering().spell("a×b") == ("axb", None)


def test_the_palette_is_distinct_and_falls_back() -> None:
    assert len(set(PALETTE)) == len(PALETTE)
    words = [f"word{number}" for number in range(40)]
    colours = colours_of(words)
    assert [colours[word] for word in words[: len(PALETTE)]] == list(PALETTE)
    assert colours["word39"] == NEUTRAL
    named = colours_of(["dog", "Blue", "sky", *words])
    assert named["Blue"] == NAMED["blue"] in PALETTE
    assert list(named.values()).count(NAMED["blue"]) == 1
    assert (named["dog"], named["sky"]) == PALETTE[:2]
