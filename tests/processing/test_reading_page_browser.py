"""Pages of readings in a real browser: pointer, keys, search, sliders, two views, hostile words, many cells."""

from __future__ import annotations

import numpy as np
import pytest
from reading_pages import HOSTILE, make_outlines, make_picture, make_series

from dualstream.processing.reading_series import ReadingPoint, ReadingSeries
from dualstream.processing.token_boxes import Block, TokenGeometry
from dualstream.processing.token_map_html import render_page
from dualstream.processing.words import visible

WORD = "document.querySelector('#details h2').textContent"


def word_of(series, point, cell, rank=0) -> str:
    return visible(HOSTILE[int(series.ids[point, cell, rank])])


def point_of(series, vision, llm) -> int:
    return next(at for at, point in enumerate(series.points) if point[:2] == (vision, llm))


@pytest.fixture(scope="module")
def series():
    return make_series(), make_series("two", grid=(6, 8), vision=1, llm=1, seed=1)


@pytest.fixture(scope="module")
def address(series, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    title = "</title><script>window.hacked = 4</script>"
    path.write_text(render_page(series, make_picture(), title, "", make_outlines()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(chromium, address):
    chromium.scheme("light")
    chromium.resize(1280, 900)
    chromium.open(address)
    chromium.wait("greyPicture !== null")
    yield chromium
    assert chromium.errors == []
    assert chromium.requests == [address]
    assert chromium.run("window.hacked ?? 0") == 0
    assert chromium.run("document.querySelectorAll('script').length") == 2


def place(page, cell, view=0) -> tuple[float, float]:
    """Where a cell is in the window."""
    frame = page.run(f"views[{view}].stage.spacer.getBoundingClientRect().toJSON()")
    box, scale = page.run(f"[[...views[{view}].series.box({cell})], views[{view}].stage.scale]")
    return frame["x"] + (box[0] + box[2]) / 2 * scale, frame["y"] + (box[1] + box[3]) / 2 * scale


def colour_at(page, cell) -> list[int]:
    """Colour near the left top corner of a cell, where no word is."""
    pixel = "getImageData((left + 4) * stage.ratio, (top + 4) * stage.ratio, 1, 1).data"
    return page.run(
        f"(() => {{ const {{ stage, series }} = views[0]; const [left, top] = stage.placed(series.box({cell}));"
        f" return [...stage.low.getContext('2d').{pixel}]; }})()"
    )


def test_hover_shows_a_cell_and_a_click_keeps_it(page, series):
    one, last = series[0], series[0].start
    page.mouse(*place(page, 5))
    assert page.run(WORD) == word_of(one, last, 5)
    page.mouse(*place(page, 7), click=True)
    page.mouse(*place(page, 2))
    assert page.run(WORD) == word_of(one, last, 2)
    page.mouse(1, 1)
    assert page.run(WORD) == word_of(one, last, 7), "what was clicked stays"
    rows = page.run("[...document.querySelectorAll('#details tr')].map((row) => [...row.cells].at(-1).textContent)")
    assert [float(row) for row in rows] == pytest.approx(np.exp(one.scores[last, 7]).tolist(), abs=6e-4)


def test_the_keyboard_reaches_cells_depths_and_the_search(page, series):
    one = series[0]
    page.run("document.querySelector('#second').focus()")
    for _ in range(12):
        page.press("Tab")
        if page.run("document.activeElement.className") == "stage":
            break
    assert page.run("document.activeElement.className") == "stage"
    outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus must be visible"
    keys = ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "End", "Home", "ArrowUp"]
    cells = [1, 5, 9, 9, 8, 11, 8, 4]
    for key, cell in zip(keys, cells, strict=True):
        page.press(key)
        assert page.run("state.cell.cell") == cell
        assert page.run(WORD) == word_of(one, one.start, cell)
    assert page.run("document.getElementById('said').textContent").startswith("row 2, column 1: ")
    page.press("PageDown")
    assert page.run(WORD) == word_of(one, point_of(one, 3, 1), 4)
    page.press("Shift+PageDown")
    assert page.run(WORD) == word_of(one, point_of(one, 2, 1), 4)
    assert page.run("document.querySelector('.axis0').getAttribute('aria-valuetext')") == "2 of 3"
    page.press("Enter")
    assert page.run("document.getElementById('search').value") == word_of(one, point_of(one, 2, 1), 4)
    page.press("Escape")
    assert page.run("state.query") == ""
    page.press("/")
    assert page.run("document.activeElement.id") == "search"


def test_sliders_go_through_every_depth_and_the_drawing_follows(page, series):
    one = series[0]
    page.mouse(*place(page, 6), click=True)
    for at, llm in enumerate([None, 0, 1, 2]):
        page.set("document.querySelector('.axis1')", at)
        point = point_of(one, 3, llm)
        assert page.run("views[0].point") == point
        assert page.run(WORD) == word_of(one, point, 6)
        drawn = page.run("views[0].visible.map((cell) => data.words[views[0].series.word(views[0].point, cell)])")
        assert drawn == [word_of(one, point, cell) for cell in range(12)]
    before = page.run("views[0].stage.low.toDataURL()")
    page.set("document.querySelector('.axis0')", 0)
    assert page.run("views[0].stage.low.toDataURL()") != before


def test_a_search_colours_cells_by_the_probability_of_the_word(page, series):
    one = series[0]
    page.run("document.getElementById('search').focus()")
    page.type("DOG")
    dogs = np.isin(one.ids[one.start], [1, 2])  # " dog" and "Dog"
    expected = np.where(dogs, np.exp(one.scores[one.start]), 0).sum(axis=1)
    assert page.run("[...views[0].heat.values]") == pytest.approx(expected.tolist(), abs=1e-3)
    assert page.run("document.getElementById('hits').textContent").startswith(
        f"in {dogs.any(axis=1).sum()} of 12 cells"
    )
    low, high = colour_at(page, int(expected.argmin())), colour_at(page, int(expected.argmax()))
    assert low[1] < high[1], "viridis grows brighter"
    page.press("Escape")
    assert page.run("views[0].heat") is None
    page.type("photographers")  # part of a word
    assert "no such word" in page.run("document.getElementById('hits').textContent")


def test_runs_and_what_a_compression_keeps(page, series):
    one = series[0]
    plan, point = one.plans[1], one.start
    table = page.run("[...document.querySelectorAll('#fate tr')].slice(1).map((row) => row.cells[1].textContent)")
    assert [int(text.split()[0]) for text in table] == [int(item.tokens[point]) for item in one.plans]
    page.set("[...document.querySelectorAll('.bar select')].at(-1)", 2)
    dropped, kept = int(np.flatnonzero(~plan.kept[point])[0]), int(np.flatnonzero(plan.kept[point])[0])
    assert sum(colour_at(page, dropped)[:3]) < sum(colour_at(page, kept)[:3])
    page.mouse(*place(page, dropped), click=True)
    fates = page.run("[...document.querySelectorAll('#fate tr')].slice(1).map((row) => row.cells[2].textContent)")
    assert fates[1] == "dropped" and fates[0] != "dropped"


def test_the_way_of_a_cell_through_the_depths_is_shown_and_leads_there(page, series):
    one = series[0]
    page.mouse(*place(page, 3), click=True)
    page.click("#paths details summary")
    rows = page.run(
        "[...document.querySelectorAll('#paths table')[0].rows].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    points = [point_of(one, vision, 2) for vision in range(4)]
    assert [row[:2] for row in rows] == [[str(vision), word_of(one, point, 3)] for vision, point in enumerate(points)]
    assert [float(row[2]) for row in rows] == pytest.approx(np.exp(one.scores[points, 3, 0]).tolist(), abs=6e-4)
    page.click("#paths table tr:first-child button")
    assert page.run("views[0].point") == points[0]
    assert page.run("document.querySelectorAll('#paths .chart.line, #paths polyline').length") > 2


def test_two_views_show_two_models_and_then_two_depths(page, series):
    one, two = series
    page.click("#second")
    assert page.run("views.map((view) => view.series.name)") == ["one", "two"]
    page.mouse(*place(page, 5), click=True)
    centre = np.array([(5 % 4 + 0.5) * 20, (5 // 4 + 0.5) * 20])
    cell = int(centre[1] // 10 * 8 + centre[0] // 10)
    assert page.run("mapped(state.cell, views[1])") == cell
    page.mouse(*place(page, cell, 1))
    assert page.run(WORD) == word_of(two, two.start, cell)
    page.set("views[1].bar.querySelector('select')", 0)
    assert page.run("views[1].series.name") == "one"
    assert "12 of 12 cells" in page.run("document.getElementById('agree').textContent")
    page.set("views[1].bar.querySelector('.axis0')", 0)
    point = point_of(one, 0, 2)
    same = sum(word_of(one, point, cell) == word_of(one, one.start, cell) for cell in range(12))
    assert f"in {same} of 12 cells" in page.run("document.getElementById('agree').textContent")
    page.click("#second")
    assert page.run("views.length") == 1


def test_boxes_and_masks_are_drawn_on_demand(page):
    inside, outside = 5, 11  # the mask lies over cell 5
    page.run("document.getElementById('tint').click()")
    before = colour_at(page, inside), colour_at(page, outside)
    page.click("#objects")
    after = colour_at(page, inside), colour_at(page, outside)
    assert before[0] != after[0] and before[1] == after[1]


def test_words_show_as_they_are_and_none_is_run(page, series):
    shown = page.run("[...SERIES[0].top].map((entry) => data.words[SERIES[0].wordOf[entry]])")
    assert shown == [visible(HOSTILE[number]) for number in series[0].ids.reshape(-1).tolist()]
    assert page.run("document.title") == "</title><script>window.hacked = 4</script>"
    assert page.run("document.querySelectorAll('img').length") == 0


def test_both_schemes_are_legible_and_narrow_windows_do_not_overflow(page):
    page.mouse(*place(page, 5), click=True)
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        assert contrast(page, "#details .note") > 4.5 and contrast(page, "#details h2") > 7
    page.resize(390, 800)
    assert page.run("document.documentElement.scrollWidth") <= 390


def contrast(page, selector: str) -> float:
    """WCAG contrast of a text with the panel behind it."""
    style = "getComputedStyle(document.querySelector('{}')).{}"
    texts = [page.run(style.format(selector, "color")), page.run(style.format("aside", "backgroundColor"))]
    light = []
    for text in texts:
        values = np.array([float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(light) / min(light)


def test_tiles_and_thumbnail_take_turns(chromium, tmp_path):
    blocks = (Block(2, 2, 0, 0, 20, 30), Block(2, 2, 40, 0, 20, 30), Block(2, 2, 0, 0, 40, 30, thumbnail=True))
    ids = np.arange(12).reshape(1, 12, 1)
    series = ReadingSeries("tiles", (ReadingPoint(),), ids, HOSTILE, TokenGeometry((80, 60), blocks))
    (tmp_path / "page.html").write_text(render_page([series], make_picture(), "tiles"), encoding="utf-8")
    chromium.resize(1280, 900)
    chromium.open((tmp_path / "page.html").as_uri())
    chromium.wait("greyPicture !== null")
    assert chromium.run("views[0].visible") == list(range(8))
    chromium.mouse(*place(chromium, 1), click=True)
    chromium.run("views[0].stage.box.focus()")
    chromium.press("ArrowRight")
    assert chromium.run("state.cell.cell") == 4, "from one tile into the next"
    assert "tile 2" in chromium.run("document.querySelector('#details .note').textContent")
    chromium.set("document.querySelector('.bar select')", 1)
    assert chromium.run("views[0].visible") == [8, 9, 10, 11]
    chromium.mouse(*place(chromium, 11), click=True)
    assert "thumbnail" in chromium.run("document.querySelector('#details .note').textContent")
    assert chromium.run(WORD) == visible(HOSTILE[11]) and chromium.errors == []


# What a person does on a large page; the read of a pixel waits until the canvas is drawn.
DRAWN = "views[0].stage.low.getContext('2d').getImageData(0, 0, 1, 1)"
ACTIONS = {
    "slide": "views[0].go(turn)",
    "search": "search(turn % 2 ? 'dog' : 'sky')",
    "hover": "hover(views[0], 50 * turn + 9)",
    "choose": "choose(views[0], 50 * turn + 7)",
    "zoom": "byId('zoom').value = turn % 2 ? 4 : 6; zoom()",
}


@pytest.mark.slow
def test_thousands_of_cells_do_not_lag(chromium, tmp_path):
    series = make_series(grid=(50, 50), vision=4, llm=4, k=5, size=(1400, 1400))
    path = tmp_path / "large.html"
    path.write_text(render_page([series], make_picture((1400, 1400)), "large"), encoding="utf-8")
    chromium.resize(1280, 900)
    chromium.open(path.as_uri())
    chromium.wait("greyPicture !== null")
    spent = {name: chromium.milliseconds(f"{script}; {DRAWN}") for name, script in ACTIONS.items()}
    assert chromium.errors == []
    parts = "[views[0].stage.box, document.querySelector('aside')]"
    edges = chromium.run(f"{parts}.map((part) => part.getBoundingClientRect().toJSON())")
    assert edges[0]["right"] <= edges[1]["left"], (
        "a picture that is larger than its place is scrolled, not spread over the panel"
    )
    assert chromium.run("views[0].stage.low.width * views[0].stage.low.height") < 4e6, "a canvas of what is seen"
    assert max(spent.values()) < 50, f"milliseconds: {spent}"
