"""``dualstream analyze what`` from end to end: files, resuming, folders of pictures, annotation files, messages."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dualstream.analysis.annotated_images import open_annotated
from dualstream.analysis.what.command import shown_depths
from dualstream.analysis.what.depth_maps import load_depth_maps, read_vocabulary
from dualstream.cli import main

pytest.importorskip("matplotlib")
SMALL = ["--limit", "6", "--validation", "5", "--train", "4", "--inside", "3", "--batch-size", "3"]
FIGURES = {"vision_depths.png", "llm_depths.png", "inside.png", "maps.png"}


def call(capsys, *arguments):
    status = main(["analyze", "what", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("what") / "run"
    assert main(["analyze", "what", "--data", "scenes", "--out", str(out), *SMALL]) == 0
    return out


def test_a_run_leaves_rows_figures_and_a_report(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["images"] == 6 and summary["native_vision_depth"] == 5 and summary["choice"]["images"] == 5
    assert {path.name for path in finished.glob("*.png")} == FIGURES
    report = (finished / "report.md").read_text()
    for heading in (
        "Two stages",
        "Is it there?",
        "Regions against masks",
        "Lenses side by side",
        "Readings by vision",
    ):
        assert heading in report
    command = json.loads((finished / "manifest.json").read_text())["command"]
    assert str(finished.parent) not in report.replace(command, "")
    name = next(path for path in (finished / "rows").iterdir() if path.name.startswith("test"))
    maps = load_depth_maps(name, read_vocabulary(finished))
    assert maps.ids.shape[1:] == (64, 5) and maps.words[:2] == ("circle", "square")
    assert {step.lens for step in maps.steps} == {"normed", "plain", "tuned", "decoder"}
    for row in summary["emergence"]:
        assert row["control"]["value"] <= row["emergence"]["value"] <= 1
    regions = summary["regions"]
    assert max(row["miou"]["value"] for row in regions["raw"]) > 3 * max(
        row["miou"]["value"] for row in regions["control"]
    )


def test_a_run_that_was_cut_short_ends_the_same(finished, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    rows = sorted((again / "rows").iterdir())
    for path in (*rows[::3], *list((again / "inside" / "rows").iterdir())[:1], *(again / "lenses" / "rows").iterdir()):
        path.unlink()
    (again / "summary.json").unlink()
    (again / "flow.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (again / "rows").iterdir()}
    status, payload = call(capsys, "--data", "scenes", "--out", again, *SMALL)
    assert status == 0 and set(payload["figures"]) == FIGURES
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (finished, again))
    assert one == other
    for path in rows:
        assert pq.read_table(path).equals(pq.read_table(finished / "rows" / path.name))


def test_another_run_in_the_folder_is_refused(finished, capsys):
    status, payload = call(capsys, "--data", "scenes", "--out", finished, *SMALL, "--seed", "1")
    assert status == 2 and "another configuration (seed: 0 there, 1 now)" in payload["error"]


def test_a_folder_of_pictures_is_read_without_objects(tmp_path, capsys):
    for name, size in (("a.png", (60, 30)), ("b.jpg", (33, 90)), ("c.png", (20, 20))):
        (tmp_path / "photos").mkdir(exist_ok=True)
        noise = np.random.default_rng(len(name)).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / name)
    status, payload = call(
        capsys,
        "--images",
        tmp_path / "photos",
        "--out",
        tmp_path / "out",
        "--model",
        "tiny-qwen2-vl",
        "--llm-depth",
        3,
    )
    assert status == 0 and payload["images"] == 3 and payload["llm_depth"] == 3
    assert "emergence" not in payload and set(payload["figures"]) == {"vision_depths.png", "maps.png"}
    assert "as asked for" in (tmp_path / "out" / "report.md").read_text()


@pytest.fixture
def annotated(tmp_path):
    """The same scenes, not square, as COCO instances and as GQA scene graphs."""
    images = tmp_path / "images"
    images.mkdir()
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "circle"}, {"id": 2, "name": "star"}]}
    graphs = {}
    for number, item in enumerate(open_annotated("scenes:test:24:60")):
        picture = item.image().resize((90, 60))
        picture.save(images / f"{number}.png")
        coco["images"].append({"id": number, "file_name": f"{number}.png", "width": 90, "height": 60})
        graphs[str(number)] = {"width": 90, "height": 60, "objects": {}}
        for place, thing in enumerate(item.objects):
            x, y, width, height = (
                thing.box[0] * 1.5,
                thing.box[1],
                (thing.box[2] - thing.box[0]) * 1.5,
                thing.box[3] - thing.box[1],
            )
            box = [x, y, width, height]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]),
                    "image_id": number,
                    "category_id": 1 + place % 2,
                    "bbox": box,
                    "iscrowd": int(place == 3),
                    "segmentation": [corners],
                }
            )
            graphs[str(number)]["objects"][str(place)] = {
                "name": thing.name,
                **dict(zip("xywh", box, strict=True)),
                "attributes": list(thing.attributes),
            }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "gqa.json").write_text(json.dumps(graphs))
    return tmp_path


@pytest.mark.parametrize(("kind", "labels"), [("coco", "scenes"), ("gqa", None)])
def test_annotation_files_go_all_the_way(annotated, capsys, kind, labels):
    data = f"{kind}:{annotated / kind}.json:{annotated / 'images'}"
    extra = [] if labels is None else ["--labels", labels]
    status, payload = call(
        capsys, "--data", data, "--out", annotated / "out", "--validation", 4, "--train", 3, "--inside", 2, *extra
    )
    assert status == 0 and 2 <= payload["images"] < 24
    assert payload["schema"] == (labels or "annotations")
    emergence = [row["emergence"]["value"] for row in payload["emergence"]]
    assert all(0 <= value <= 1 for value in emergence)
    if kind == "gqa":  # true names: they are found in squeezed pictures, too
        assert max(row["gain"]["low"] for row in payload["emergence"]) > 0
    assert payload["options"]["data"] == kind  # no path of this machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "data='nothing' is no source of pictures"),
        (["--data", "scenes", "--llm-depth", "9"], "llm_depth=9 must lie within 0..5"),
        (["--data", "scenes", "--top-k", "2"], "top_k must be at least 3"),
        (["--data", "scenes", "--train", "-1"], "train must be 0 or more"),
        (["--data", "scenes", "--validation", "0"], "validation must be at least 1"),
        (["--data", "scenes", "--labels", "photos"], "labels='photos' is no schema"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, arguments, message):
    status, payload = call(capsys, *arguments, "--out", tmp_path / "out")
    assert status == 2 and message in payload["error"]


def test_depths_shown_hold_the_native_one():
    assert shown_depths(range(4), 3) == [0, 1, 2, 3]
    assert shown_depths(range(25), 23) == [0, 5, 10, 14, 19, 23]
    assert shown_depths(range(7), 5) == [0, 1, 2, 4, 5, 6]
