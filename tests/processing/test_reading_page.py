"""Pages of readings without a browser: what is encoded is what was read, and no text can leave its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading_pages import HOSTILE, Page, decoded, make_outlines, make_picture, make_series, probabilities

from dualstream.processing.page_data import page_data, quantized, shown, to_script
from dualstream.processing.reading_series import ReadingPoint, ReadingSeries, plan_methods
from dualstream.processing.token_boxes import Block, TokenGeometry
from dualstream.processing.token_map import TokenMap
from dualstream.processing.token_map_html import fill, render_page
from dualstream.processing.words import has_meaning, visible


def page_of(*series, **more) -> str:
    return render_page(series or [make_series()], make_picture(), "A title", "a note", make_outlines(), **more)


def test_every_number_comes_back_as_it_was_read():
    series = make_series(tracked={" cat": np.log(np.full((16, 12), 0.25))})
    data = Page(page_of(series)).data
    (raw,) = data["series"]
    points, cells, k = series.ids.shape
    top = decoded(raw["top"], "<u2", points, cells, k)
    np.testing.assert_array_equal(np.array(raw["ids"])[top], series.ids)
    words = np.array(data["words"], dtype=object)[np.array(raw["word_of"])[top]]
    assert words.reshape(-1).tolist() == [visible(HOSTILE[number]) for number in series.ids.reshape(-1)]
    p = probabilities(raw["nats"], points, cells, k)
    np.testing.assert_allclose(p, np.exp(series.scores), rtol=2e-4, atol=2e-7)
    np.testing.assert_allclose(decoded(raw["boxes"], "<f4", cells, 4), series.geometry.boxes, rtol=1e-6)
    np.testing.assert_allclose(probabilities(raw["tracked"]["cat"], points, cells), 0.25, rtol=2e-4)
    for plan, encoded in zip(series.plans, raw["plans"], strict=True):
        flags = decoded(encoded["flags"], "u1", points, cells)
        np.testing.assert_array_equal(np.cumsum(flags & 1, axis=1) - 1, plan.run)
        np.testing.assert_array_equal((flags & 2) > 0, plan.kept)
        np.testing.assert_array_equal((flags & 4) > 0, plan.anchor)
    assert [tuple(point) for point in raw["points"]] == [tuple(point) for point in series.points]
    meant = {visible(piece) for piece in HOSTILE.values() if has_meaning(piece)}
    assert {word for word, sign in zip(data["words"], data["meaning"], strict=True) if sign == "1"} == meant
    assert [sign == "1" for sign in raw["blank"]] == [bool(re.match(r" +[^ ]", HOSTILE[i])) for i in raw["ids"]]


def test_masks_come_back_from_their_stretches():
    data = page_data([make_series()], None, make_outlines())
    mask = data["objects"][0]["mask"]
    values = np.repeat(np.arange(len(mask["runs"])) % 2 == 1, mask["runs"]).reshape(mask["size"])
    np.testing.assert_array_equal(values, make_outlines()[0].mask)
    assert data["objects"][1]["mask"] is None
    large = np.zeros((3000, 1000), bool)
    large[:1500] = True
    outline = make_outlines()[0]
    halved = page_data([make_series()], None, [type(outline)("x", (0, 0, 1, 1), large)])["objects"][0]["mask"]
    assert max(halved["size"]) <= 512
    assert sum(halved["runs"][1::2]) / np.prod(halved["size"]) == pytest.approx(0.5, abs=0.01)
    full = page_data([make_series()], None, [type(outline)("x", (0, 0, 1, 1), np.ones((4, 4), bool))])
    assert full["objects"][0]["mask"]["runs"] == [0, 16]


@pytest.mark.parametrize(
    "title", ['<b onclick="x">"</b>', "</title><script>1</script>", "a\ud800\u202eb\x00", "<!--DATA-->"]
)
def test_no_text_leaves_its_place_and_nothing_is_fetched(title):
    text = render_page([make_series(title)], make_picture(), title, title, make_outlines())
    page = Page(text)
    text.encode("utf-8")
    assert page.tags.count("script") == 2 and "b" not in page.tags
    assert page.values("src", "href", "action", "srcset", "onclick", "onerror", "style") == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|//[a-z]+\.[a-z]+/|@import|url\(", text)
    assert "\u202e" not in text and "\u2028" not in text
    assert shown(title) in "".join(page.texts)
    assert set(page.data["words"]) == {visible(piece) for piece in HOSTILE.values()}


def test_the_policy_names_the_pages_own_script_and_style_by_hash():
    text = page_of()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert "unsafe" not in policy


@given(st.recursive(st.text(st.characters()), lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_script_data_is_ascii_without_a_tag_and_means_the_same(value):
    text = to_script(value)
    assert text.isascii() and "<" not in text
    assert json.loads(text) == value


@given(st.floats(max_value=0, allow_nan=False))
def test_probabilities_are_kept_to_a_part_in_four_thousand(value):
    back = np.exp(-float(quantized(np.array([value]))[0]) / 4096)
    assert back == pytest.approx(np.exp(value), rel=1.3e-4, abs=np.exp(-15.9))


def test_what_is_no_probability_counts_as_none():
    assert quantized(np.array([np.nan, -np.inf, 0.0])).tolist() == [65535, 65535, 0]


def test_fill_does_not_search_what_it_put_in():
    assert fill("<!--A--> <!--B--> <!-- c -->", A="<!--B-->", B="<!--A-->") == "<!--B--> <!--A--> <!-- c -->"
    with pytest.raises(ValueError, match="no place for X"):
        fill("<!--A-->", X="")


def test_a_large_page_is_small_enough_to_mail():
    series = make_series(grid=(50, 50), vision=4, llm=4, k=5, size=(1400, 1400))
    assert len(series.points) == 30
    size = len(render_page([series], make_picture((1400, 1400)), "large").encode())
    picture = len(page_data([series], make_picture((1400, 1400)))["picture"])
    assert size - picture < 2_500_000
    assert size < 5_000_000


def test_large_pictures_are_embedded_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2500, 4000, 3), dtype=np.uint8))
    uri = page_data([make_series(size=(4000, 2500))], noise)["picture"]
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 3_000_000
    assert page_data([make_series()], make_picture())["picture"].startswith("data:image/png;base64,")
    assert page_data([make_series()], None)["picture"] is None


def test_many_entries_take_wider_numbers():
    ids = np.arange(70_000).reshape(1, 7, 10_000)
    geometry = TokenGeometry((70, 10), (Block(1, 7, 0, 0, 10, 10),))
    series = ReadingSeries("", (ReadingPoint(),), ids, {number: f"w{number}" for number in range(70_000)}, geometry)
    (raw,) = page_data([series], None)["series"]
    assert raw["wide"] and raw["nats"] is None
    np.testing.assert_array_equal(decoded(raw["top"], "<u4", 7, 10_000), ids[0])


def test_a_token_maps_page_holds_its_compression():
    ids = np.arange(8)[:, None]
    geometry = TokenGeometry((80, 40), (Block(2, 4, 0, 0, 20, 20),))
    run, anchor = np.array([0, 0, 1, 2, 3, 4, 5, 6]), np.array([0, 2, 4])
    token_map = TokenMap(ids, HOSTILE, ((2, 4),), geometry=geometry, run=run, anchor=anchor)
    data = Page(token_map.to_html("a map")).data
    assert data["compressed"] and data["picture"] is None
    flags = decoded(data["series"][0]["plans"][0]["flags"], "u1", 8)
    assert ((flags & 2) > 0).tolist() == token_map.keeps.tolist()
    assert np.flatnonzero(flags & 4).tolist() == anchor.tolist()


def test_plans_of_many_points_equal_those_of_each():
    import torch

    from dualstream.modeling import CompressionConfig, run_length_plan

    rng = np.random.default_rng(1)
    ids, grids = rng.integers(0, 4, (5, 10, 2)), [(2, 3), (1, 4)]
    meaningless = torch.tensor([True, False, False, True])
    tables = (meaningless, torch.arange(4))
    plans = plan_methods(ids, grids, tables, ("rle", "rle_drop_top1", "rle_drop_top2", "paper:rle"))
    assert [plan.name for plan in plans] == ["rle", "rle_drop_top1", "rle_drop_top2", "paper:rle"]
    for plan in plans:
        config = CompressionConfig.from_any(plan.name)
        for point in range(5):
            alone = run_length_plan(torch.from_numpy(ids[point]), torch.tensor(grids), config, *tables)
            np.testing.assert_array_equal(plan.run[point], alone.run)
            np.testing.assert_array_equal(np.flatnonzero(plan.anchor[point]), alone.anchor)
            np.testing.assert_array_equal(plan.kept[point], ~alone.dropped)
            assert plan.tokens[point] == alone.num_kept
    assert [plan.name for plan in plan_methods(ids[..., :1], grids, tables)] == ["rle", "rle_drop_top1"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"points": ()}, "points must be"),
        ({"points": (ReadingPoint(), ReadingPoint())}, "each once"),
        ({"start": 1}, "start must be"),
        ({"scores": np.zeros((1, 1, 1))}, "scores must have"),
        ({"tracked": {"x": np.zeros((1, 12))}}, "need scores"),
    ],
)
def test_series_that_do_not_fit_are_refused(change, message):
    geometry = TokenGeometry((80, 60), (Block(3, 4, 0, 0, 20, 20),))
    options = {"points": (ReadingPoint(),), "ids": np.zeros((1, 12, 1), int)} | change
    with pytest.raises(ValueError, match=message):
        ReadingSeries("", pieces={0: "a"}, geometry=geometry, **options)


def test_series_of_different_pictures_share_no_page():
    with pytest.raises(ValueError, match="one picture"):
        page_data([make_series(), make_series(size=(40, 30))], None)
    with pytest.raises(ValueError, match="one picture"):
        page_data([], None)
