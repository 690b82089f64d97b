"""The Space without its interface: what its buttons do, the folder as Hugging Face takes it, the exported copy."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from reading_pages import Page, decoded

from dualstream.cli import main
from dualstream.data_builders.scenes import SPLIT_SEEDS
from dualstream.hub_cards.space import export
from dualstream.hub_cards.space.drawing import (
    empty_scene,
    picture_of,
    random_scene,
    suggestions,
    with_shape,
)
from dualstream.hub_cards.space.workbench import FULL, SCALINGS, STOCK, Workbench, framed
from dualstream.modeling import load_model, rope_scaled
from dualstream.processing import answer_questions, read_image

HOME = Path(export.__file__).parent
SETUP = Path(__file__).parents[2] / "setup.py"
MODELS = ("tiny-llava", "tiny-qwen2-vl")


@pytest.fixture(scope="module")
def bench():
    return Workbench(MODELS)


@pytest.fixture(scope="module")
def scene():
    return random_scene(7, 4)


def test_a_page_holds_every_model_and_its_scaled_variant(bench, scene):
    page = Page(bench.read(picture_of(scene), MODELS, "poly:99:8"))
    series = page.data["series"]
    assert [item["name"] for item in series] == ["tiny-llava", "tiny-qwen2-vl", "tiny-qwen2-vl, RoPE poly:99:8"]
    model, processor = load_model("tiny-qwen2-vl")
    for item, scaling in zip(series[1:], (None, "poly:99:8"), strict=True):
        with rope_scaled(model, scaling):
            own = read_image(model, processor, picture_of(scene), depth=5)
        shape = len(item["points"]), len(own), item["k"]
        at = item["points"].index([item["native"], 5, "normed"])
        ids = np.array(item["ids"])[decoded(item["top"], "<u2", *shape)[at, :, 0]]
        np.testing.assert_array_equal(ids, own.ids[:, 0])
    assert series[1]["top"] != series[2]["top"], "the scaling changes the reading"


def test_answers_come_with_and_without_compression_and_scaling(bench, scene):
    (asked, *_) = suggestions(scene)
    replies = bench.ask(picture_of(scene), asked.question, MODELS, "rle", "poly:99:8")
    assert [(reply.model, reply.rope, reply.prompt) for reply in replies] == [
        ("tiny-llava", STOCK, FULL),
        ("tiny-llava", STOCK, "rle"),
        ("tiny-qwen2-vl", STOCK, FULL),
        ("tiny-qwen2-vl", STOCK, "rle"),
        ("tiny-qwen2-vl", "poly:99:8", FULL),
        ("tiny-qwen2-vl", "poly:99:8", "rle"),
    ]
    model, processor = load_model("tiny-llava")
    for reply, compression in zip(replies[:2], (None, "rle"), strict=True):
        (own,) = answer_questions(
            model, processor, [picture_of(scene)], [asked.question], compression=compression, max_new_tokens=32
        )
        assert (reply.answer, reply.kept, reply.total) == (own.text, own.kept_tokens, own.visual_tokens)
    assert replies[0].kept == 64 > replies[1].kept
    assert replies[1].row[3:5] == [replies[1].answer, f"{replies[1].kept} of 64"]
    assert len(bench.ask(picture_of(scene), "What?", ["tiny-llava"], "none")) == 1


def test_nothing_is_left_behind_by_a_scaled_request(bench, scene):
    picture, names = picture_of(scene), ["tiny-qwen2-vl"]
    before = bench.read(picture, names)
    bench.read(picture, names, "poly:99:8")
    with pytest.raises(ValueError):
        bench.ask(picture, "What?", names, "rle", "nonsense")
    assert bench.read(picture, names) == before


def test_requests_at_once_do_not_disturb_each_other(bench, scene):
    picture = picture_of(scene)
    jobs = [(["tiny-qwen2-vl"], scaling) for scaling in (STOCK, "poly:99:8") * 3]
    alone = {scaling: bench.read(picture, ["tiny-qwen2-vl"], scaling) for scaling in (STOCK, "poly:99:8")}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: bench.read(picture, *job), jobs))
    assert together == [alone[scaling] for _, scaling in jobs]


@pytest.mark.parametrize("mode, size", [("RGBA", (3, 90)), ("L", (500, 20)), ("I;16", (40, 40)), ("P", (1, 1))])
def test_any_upload_is_read_and_asked(bench, mode, size):
    picture = Image.new(mode, size)
    assert Page(bench.read(picture, MODELS)).data["size"] == list(size)
    assert len(bench.ask(picture, "What is it?", ["tiny-llava"], "rle")) == 2


@pytest.mark.parametrize("scaling", [scaling for scaling in SCALINGS if scaling != STOCK])
def test_every_scaling_on_offer_works(bench, scene, scaling):
    assert len(bench.ask(picture_of(scene), "What?", ["tiny-qwen2-vl"], "none", scaling)) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "no picture yet"),
        ({"question": "  "}, "1 to 500 letters"),
        ({"question": "x" * 501}, "got 501"),
        ({"names": []}, "at least one model"),
        ({"names": ["other"]}, "is not served here"),
        ({"compression": "zip"}, "zip"),
        ({"scaling": "poly:99:8"}, "no rotary vision tower"),
        ({"names": ["tiny-qwen2-vl"], "scaling": "cubic"}, "cubic"),
    ],
)
def test_mistakes_are_named(bench, scene, change, message):
    options = {"image": picture_of(scene), "question": "What?", "names": ["tiny-llava"], "compression": "rle"}
    with pytest.raises(ValueError, match=message):
        bench.ask(**(options | change))


def test_a_bench_needs_models():
    with pytest.raises(ValueError, match="at least one model"):
        Workbench([])


def test_scenes_are_those_of_their_numbers_and_held_out():
    assert random_scene(3, 5) == random_scene(3, 5) != random_scene(4, 5)
    assert random_scene(3, 5).seed in SPLIT_SEEDS["test"]
    assert random_scene(10**12, 1).seed in SPLIT_SEEDS["test"]
    assert [len(random_scene(3, count).objects) for count in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        random_scene(-1, 3)
    with pytest.raises(ValueError, match="n_objects is 7"):
        random_scene(1, 7)


def test_shapes_are_put_where_they_are_wanted_and_stay_inside(bench):
    scene = with_shape(None, "circle", "red", "solid", 0.25, 0.75)
    pixels = np.asarray(picture_of(scene), int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 80)
    rows, columns = np.nonzero(red)
    assert columns.mean() / pixels.shape[1] == pytest.approx(0.25, abs=0.01)
    assert rows.mean() / pixels.shape[0] == pytest.approx(0.75, abs=0.01)
    corner = with_shape(scene, "square", "blue", "solid", 0, 1).objects[-1]
    assert corner.x - corner.radius >= 0 and corner.y + corner.radius <= 1
    assert {item.answer for item in suggestions(scene)} and suggestions(empty_scene()) == []
    (reply,) = bench.ask(picture_of(scene), "What color is the circle?", ["tiny-llava"], "none")
    assert reply.answer == "red"


def test_too_many_and_unknown_shapes_are_refused():
    scene = None
    for place in range(6):
        scene = with_shape(scene, "star", "blue", "dotted", place / 6, 0.5)
    with pytest.raises(ValueError, match="at most 6 shapes"):
        with_shape(scene, "star", "blue", "dotted", 0, 0)
    for change in ({"shape": "cube"}, {"color": "mauve"}, {"texture": "fuzzy"}):
        with pytest.raises(ValueError, match=f"{next(iter(change.values()))!r} is unknown"):
            with_shape(None, **({"shape": "star", "color": "blue", "texture": "solid", "x": 0, "y": 0} | change))


def test_a_page_in_a_frame_is_the_page_and_nothing_more():
    frame = framed('<p title="a">&amp;</p><script>"</iframe>"</script>')
    page = Page(frame)
    assert page.tags == ["iframe"]
    assert page.values("sandbox") == ["allow-scripts"], "without allow-same-origin it cannot reach the page around it"
    assert page.values("srcdoc") == ['<p title="a">&amp;</p><script>"</iframe>"</script>']
    assert unescape(frame).count("</iframe>") == 2


def test_the_folder_is_a_hugging_face_space():
    _, front, text = (HOME / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and (HOME / card["app_file"]).is_file()
    assert isinstance(card["python_version"], str) and len(card["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colours and card["license"] == "apache-2.0"
    assert "dualstream space" in text
    wanted = {line for line in (HOME / "requirements.txt").read_text().split("\n") if line}
    body = ast.parse(SETUP.read_text(encoding="utf-8")).body
    lists = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    ours = ast.literal_eval(lists["REQUIRED"])
    names = {re.split(r"[<>=]", line)[0] for line in wanted}
    assert {re.split(r"[<>=]", line)[0] for line in ours} | {"gradio"} == names
    assert set(ours) - wanted == {"pillow>=11"}, "the same bounds"
    assert "pillow>=11,<13" in wanted, "Gradio takes no newer one"
    version = re.search(r"gradio>=([\d.]+)", "\n".join(wanted))[1]
    assert card["sdk_version"].startswith(version)


def test_the_exported_copy_runs_without_an_installed_package(tmp_path, capsys):
    folder = tmp_path / "space"
    assert main(["space", "--export", str(folder), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == ["README.md", "app.py", "dualstream", "requirements.txt"]
    code = (
        "import dualstream.hub_cards.space.workbench as w, dualstream.hub_cards.space.drawing as d;"
        "print(w.__file__); print(w.Workbench(['tiny-llava']).ask(d.picture_of(d.random_scene(1, 2)), 'What?',"
        "['tiny-llava'], 'rle')[0].total)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place, total = done.stdout.split()
    assert Path(place).is_relative_to(folder) and total == "64"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".pyc")
    assert size < 40e6
    assert main(["space", "--export", str(folder), "--json"]) == 2
    assert "is not empty" in json.loads(capsys.readouterr().out)["error"]


def test_the_command_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("dualstream.hub_cards.space.command.find_spec", lambda name: None)
    assert main(["space", "--json"]) == 2
    assert "pip install 'dualstream[space]'" in json.loads(capsys.readouterr().out)["error"]
    monkeypatch.setattr("dualstream.hub_cards.space.command.find_spec", lambda name: object())
    assert main(["space", "--port", "70000", "--json"]) == 2
    assert "--port must lie" in json.loads(capsys.readouterr().out)["error"]
