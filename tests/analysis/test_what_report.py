"""Reports: from finished runs and from pictures read now, as files that are whole by themselves."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from reading_pages import Page, decoded, probabilities

from dualstream.analysis.annotated_images import open_annotated
from dualstream.analysis.resumable_rows import ResumableRows
from dualstream.analysis.what.depth_maps import DECODER, NORMED, DepthMaps, Step, write_vocabulary
from dualstream.analysis.what.reading import read_depth_maps
from dualstream.analysis.what_report.build import render_index, write_report
from dualstream.analysis.what_report.runs import RunSource
from dualstream.analysis.what_report.series import lens_name, report_steps, series_of_maps, tracked_words
from dualstream.cli import main
from dualstream.modeling import load_model
from dualstream.processing import Block, TokenGeometry, decode_pieces, read_image
from dualstream.processing.words import visible

DATA = "scenes:test:2:96"
WORDS = {"circle": [5], "never": [6]}


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-llava")


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A finished run as `dualstream analyze what` leaves it, of two scenes."""
    model, processor = tiny
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {"model": "tiny-llava", "data": DATA, "limit": None, "seed": 0}
    rows = ResumableRows(folder, settings)
    for image in open_annotated(DATA):
        maps = read_depth_maps(model, processor, image.image(), [0, 5], [None, 2, 5], words=WORDS, name=image.name)
        rows.write(f"test:{image.name}", maps.to_table())
    size = model.get_output_embeddings().weight.shape[0]
    pieces = decode_pieces(processor.tokenizer, np.arange(size))
    write_vocabulary(folder, [pieces[number] for number in range(size)])
    (folder / "choice.json").write_text('{"llm_depth": 2}')
    return folder


def pages_of(out) -> list[Page]:
    return [Page(path.read_text(encoding="utf-8")) for path in sorted((out / "pages").iterdir())]


def test_the_pages_of_a_run_hold_what_the_run_read(run_folder, tiny, tmp_path, capsys):
    assert main(["analyze", "report", str(run_folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["pictures"] == 2 and payload["models"] == ["tiny-llava"]
    images = open_annotated(DATA)
    for image, page in zip(images, pages_of(tmp_path / "out"), strict=True):
        maps = read_depth_maps(*tiny, image.image(), [0, 5], [None, 2, 5], words=WORDS)
        (series,) = page.data["series"]
        shape = maps.ids.shape
        np.testing.assert_array_equal(np.array(series["ids"])[decoded(series["top"], "<u2", *shape)], maps.ids)
        np.testing.assert_allclose(probabilities(series["nats"], *shape), np.exp(maps.log_probs), atol=2e-4)
        assert series["points"] == [
            [step.vision_depth, step.llm_depth, "" if step.llm_depth is None else "normed"] for step in maps.steps
        ]
        assert series["points"][series["start"]] == [5, 2, "normed"], "the depth that the run chose"
        assert [item["name"] for item in page.data["objects"]] == [item.name for item in image.objects]
        assert all(item["mask"] for item in page.data["objects"])
        assert page.data["picture"].startswith("data:image/")


def test_what_a_compression_keeps_is_what_the_model_would_keep(run_folder, tiny, tmp_path):
    write_report([RunSource(run_folder)], tmp_path)
    image = open_annotated(DATA)[0]
    (series,) = pages_of(tmp_path)[0].data["series"]
    at = series["points"].index([5, None, ""])
    for plan in series["plans"]:
        flags = decoded(plan["flags"], "u1", len(series["points"]), 64)[at]
        own = read_image(*tiny, image.image(), compression=plan["name"])
        assert np.flatnonzero(flags & 4).tolist() == own.anchor.tolist()
        assert ((flags & 2) > 0).tolist() == own.keeps.tolist()
    assert [plan["name"] for plan in series["plans"]] == ["rle", "rle_drop_top1", "rle_drop_top2"]


def test_two_runs_stand_side_by_side(run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    (other / "rows").joinpath(sorted(path.name for path in (other / "rows").iterdir())[0]).unlink()
    report = write_report([RunSource(run_folder), RunSource(other)], tmp_path / "out")
    assert len(report.pages) == 1, "the picture that both have"
    (page,) = pages_of(tmp_path / "out")
    assert len(page.data["series"]) == 2


def test_a_folder_of_hostile_names_is_read_now(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = ["a b#?.png", "<script>1<.png", "\u202egnp.png", "quote'\"&.png"]
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (40, 90, 3), dtype=np.uint8)).save(pictures / name)
    out = tmp_path / "out"
    command = ["analyze", "report", "--data", str(pictures), "--out", str(out), "--second-model", "tiny-qwen2-vl"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 4
    text = (out / "index.html").read_text(encoding="utf-8")
    index = Page(text)
    links = [unquote(link) for link in index.values("href")]
    assert len(links) == 4 and all((out / link).is_file() and not link.startswith("/") for link in links)
    assert index.tags.count("script") == 1 and "\u202e" not in text
    assert all(source.startswith("data:image/") for source in index.values("src"))
    files = [out / "index.html", *sorted((out / "pages").iterdir())]
    for text in (path.read_text(encoding="utf-8") for path in files):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert str(tmp_path) not in text
        assert "default-src 'none'" in text
    assert {series["name"] for series in pages_of(out)[0].data["series"]} == {"tiny-llava", "tiny-qwen2-vl"}


def test_the_index_is_found_by_word_and_sorted(chromium, tmp_path):
    entries = [
        {
            "name": name,
            "page": f"pages/{name}.html",
            "picture": "data:,",
            "models": [{"name": "m", "words": words, "shown": words[:6], "cells": 10, "kept": kept, "method": "rle"}],
        }
        for name, words, kept in [("one", ["dog", "sky"], 9), ("two", ["sky"], 2), ("three", ["<b>&", "x", "y"], 5)]
    ]
    (tmp_path / "index.html").write_text(render_index(entries, "</title>A & B"), encoding="utf-8")
    chromium.open((tmp_path / "index.html").as_uri())
    names = "items.filter((item) => !item.hidden).map((item) => item.dataset.name)"
    chromium.run("document.getElementById('find').focus()")
    chromium.type("SKY")
    assert chromium.run(names) == ["one", "two"]
    assert chromium.run("document.getElementById('count').textContent") == "2 of 3"
    chromium.set("document.getElementById('find')", "<b>&")
    assert chromium.run(names) == ["three"]
    chromium.set("document.getElementById('find')", "")
    order = "[...document.querySelectorAll('li')].map((item) => item.dataset.name)"
    for key, expected in {"kept": ["two", "three", "one"], "words": ["three", "one", "two"]}.items():
        chromium.set("document.getElementById('order')", key)
        assert chromium.run(order) == expected
    assert chromium.run("document.title") == "</title>A & B"
    assert chromium.errors == [] and len(chromium.requests) == 1


def test_a_report_is_walked_from_the_index_to_a_page(chromium, run_folder, tmp_path):
    report = write_report([RunSource(run_folder)], tmp_path)
    chromium.open(report.index.as_uri())
    chromium.click("li a")
    chromium.wait("typeof greyPicture !== 'undefined' && greyPicture !== null")
    assert chromium.run("views[0].series.name") == "tiny-llava"
    assert chromium.run("document.querySelector('#summary').textContent").startswith("tiny-llava: 64 visual tokens")
    chromium.run("document.getElementById('search').focus()")
    chromium.type("circle")  # tracked: known in every cell
    assert "known in every cell" in chromium.run("document.getElementById('hits').textContent")
    assert all(address.startswith("file:") for address in chromium.requests) and chromium.errors == []


def make_maps(**more) -> DepthMaps:
    geometry = TokenGeometry((20, 10), (Block(1, 2, 0, 0, 10, 10),))
    steps = (Step(0, None, DECODER), Step(0, 1), Step(0, 2), Step(1, 2), Step(1, 2, "plain"), Step(1, 2, NORMED, True))
    ids = np.zeros((6, 2, 2), np.int32)
    return DepthMaps("x", geometry, steps, 1, ids, np.zeros((6, 2, 2), np.float32), {0: "a"}, **more)


def test_the_point_shown_first_is_the_models_own():
    import torch

    tables = (torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
    assert series_of_maps(make_maps(), "m", tables).start == 3
    assert series_of_maps(make_maps(), "m", tables, llm_depth=1).start == 3, "not read there at the native depth"
    names = [lens_name(step) for step in make_maps().steps]
    assert names == ["", "normed", "normed", "normed", "plain", "normed, norm-matched"]


def test_wanted_words_come_first_and_unlikely_ones_stay_out():
    tracked = np.log(np.full((6, 2, 4), 1e-6))
    tracked[0, 0, 1], tracked[5, 1, 3] = np.log(0.5), np.log(0.9)
    maps = make_maps(words=("never", "maybe", "wanted", "often"), tracked=tracked)
    assert list(tracked_words(maps, ["wanted", "absent"])) == ["wanted", "often", "maybe"]
    assert list(tracked_words(maps, ["wanted"], most=2)) == ["wanted", "often"]
    np.testing.assert_array_equal(tracked_words(maps, [])["often"], tracked[:, :, 3])
    assert tracked_words(make_maps(), ["wanted"]) == {}


def test_large_models_are_read_along_their_own_path(tiny):
    whole = report_steps(tiny[0])
    assert len(whole) == 49
    path = report_steps(tiny[0], most=10)
    assert {(step.vision_depth, step.llm_depth) for step in path} == {
        (j, k) for j in range(7) for k in (None, *range(6)) if j == 5 or k in (None, 5)
    }


def test_pictures_that_have_moved_are_named_anew(tiny, run_folder, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run_folder, moved)
    settings = json.loads((moved / "configuration.json").read_text()) | {"data": "elsewhere"}
    (moved / "configuration.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="elsewhere"):
        write_report([RunSource(moved)], tmp_path / "out")
    assert len(write_report([RunSource(moved, data=DATA)], tmp_path / "out").pages) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give RUN folders"),
        (["{tmp}"], "holds no configuration.json"),
        (["{run}", "--data", "{tmp}/moved"], "is no source of pictures"),
        (["{run}", "{run}", "{run}"], "at most twice"),
        (["{run}", "--limit", "0"], "limit must be at least 1"),
        (["{run}", "--model", "no/such/model"], "tokenizer cannot be opened"),
        (["--data", "{tmp}/absent"], "is no source of pictures"),
        (["--data", "scenes:test:1", "--top-k", "0"], "--top-k must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [part.format(tmp=tmp_path, run=run_folder) for part in arguments]
    assert main(["analyze", "report", *given, "--out", str(tmp_path / "o"), "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


def test_a_run_of_something_else_and_an_empty_report_are_refused(run_folder, tmp_path):
    (tmp_path / "configuration.json").write_text('{"model": "tiny-llava"}')
    with pytest.raises(ValueError, match="lacks data, limit, seed"):
        RunSource(tmp_path)
    empty = tmp_path / "empty"
    shutil.copytree(run_folder, empty)
    for path in (empty / "rows").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no picture to show"):
        write_report([RunSource(empty)], tmp_path / "out")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "out")


def test_the_index_says_what_was_read(run_folder, tiny, tmp_path):
    report = write_report([RunSource(run_folder)], tmp_path, title="My <pictures>")
    text = unescape(report.index.read_text(encoding="utf-8"))
    image = open_annotated(DATA)[0]
    words = [word for word in read_image(*tiny, image.image(), depth=2).words if word.isalpha()]
    assert words and all(f"<bdi>{visible(word)}</bdi>" in text for word in words[:1])
    assert "My <pictures>" in text
