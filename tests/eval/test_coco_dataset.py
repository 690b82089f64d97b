"""COCO's where-questions as a dataset, from the published questions and from annotations with pictures."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from dualstream import cli
from dualstream.eval.spatial_tasks import data_folder

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def build(data, out, capsys, *options):
    status = cli.main(["build", "coco-spatial", "--data", str(data), "--out", str(out), "--json", *options])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A complete data folder of two and one rows, where the benchmark has thousands."""
    data = tmp_path / "data"
    (data / "val2017").mkdir(parents=True)
    opposites = (("left", "right"), ("top", "bottom"))
    one = [[7, *(f"A photo of a cat on the {place}" for place in places)] for places in opposites]
    two = [[8, "A photo of a cat above a cup", "A photo of a cat below a cup"]]
    for number, rows in (("one", one), ("two", two)):
        (data / f"coco_qa_{number}_obj.json").write_text(json.dumps(rows))
        task = f"coco_spatial_{number}"
        source = data_folder.SOURCES[task]
        monkeypatch.setitem(data_folder.SOURCES, task, type(source)(source.annotations, source.images, len(rows)))
    for number in (7, 8):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(data / "val2017" / f"{number:012d}.jpg")
    return data


def test_annotations_with_pictures(small, tmp_path, capsys):
    status, payload = build(small, tmp_path / "out", capsys, "--embed-images")
    assert status == 0 and payload["rows"] == {"one": {"test": 2}, "two": {"test": 1}} and payload["official"]
    rows = load_dataset(str(tmp_path / "out"), "one", split="test", cache_dir=str(tmp_path / "cache"))
    names = rows.features["relation"].names
    assert [(names[row["relation"]], names[row["opposite"]]) for row in rows] == [("left", "right"), ("top", "bottom")]
    assert rows[0]["image"].size == (30, 20) and rows[0]["image_id"] == f"{7:012d}"
    encoded = rows.cast_column("image", type(rows.features["image"])(decode=False))[0]["image"]["bytes"]
    assert encoded == (small / "val2017" / f"{7:012d}.jpg").read_bytes()


def test_a_missing_picture_is_named_and_nothing_is_written(small, tmp_path, capsys):
    (small / "val2017" / f"{8:012d}.jpg").unlink()
    status, payload = build(small, tmp_path / "out", capsys, "--embed-images")
    assert status == 2 and f"{8:012d}.jpg" in payload["error"] and not (tmp_path / "out").exists()


def test_half_a_file_is_refused(small, tmp_path, capsys):
    path = small / "coco_qa_one_obj.json"
    path.write_text(path.read_text()[:-9])
    status, payload = build(small, tmp_path / "out", capsys)
    assert status == 2 and "is the download complete" in payload["error"] and not (tmp_path / "out").exists()


def test_published_questions(tmp_path, capsys):
    if not SHARED.is_dir():
        pytest.skip("the published questions are not here (shared/data)")
    status, payload = build(SHARED, tmp_path / "out", capsys)
    assert status == 0 and payload["rows"] == {"one": {"test": 2247}, "two": {"test": 440}}
    assert not payload["official"] and "written anew" in (tmp_path / "out" / "README.md").read_text()
    rows = load_dataset(str(tmp_path / "out"), "two", split="test", cache_dir=str(tmp_path / "cache"))
    assert {(row["options"][0] != row["options"][1], row["relation"] != row["opposite"]) for row in rows} == {
        (True, True)
    }
