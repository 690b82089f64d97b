"""POPE as a dataset: what a row is, and files that are refused."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from datasets import load_dataset

from dualstream import cli

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "pope"


def question(number, image, name, label):
    text = f"Is there a{'n' if name[0] in 'aeiou' else ''} {name} in the image?"
    return json.dumps({"question_id": number, "image": f"{image}.jpg", "text": text, "label": label})


def build(folder, capsys, **files):
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    status = cli.main(["build", "pope-objects", *options, "--out", str(folder / "out"), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def files(tmp_path):
    rows = {
        "random": [
            question(1, "a", "cat", "yes"),
            question(2, "a", "apple", "no"),
            question(3, "b", "hot dog", "yes"),
        ],
        "popular": [question(1, "a", "cat", "yes"), question(2, "b", "person", "no")],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.json").write_text("\n".join(lines) + "\n")
    return {name: tmp_path / f"{name}.json" for name in rows}


def test_questions_and_pictures(files, tmp_path, capsys):
    status, payload = build(tmp_path, capsys, **files)
    assert status == 0
    assert payload["rows"] == {"random": {"test": 3}, "popular": {"test": 2}, "objects": {"test": 2}}
    cache = str(tmp_path / "cache")
    rows = load_dataset(str(tmp_path / "out"), "random", split="test", cache_dir=cache)
    assert rows["object"][:] == ["cat", "apple", "hot dog"] and rows["answer"][:] == [1, 0, 1]
    pictures = load_dataset(str(tmp_path / "out"), "objects", split="test", cache_dir=cache)
    assert pictures[:] == {
        "image_id": ["a", "b"], "present": [["cat"], ["hot dog"]], "absent": [["apple"], ["person"]],
    }  # fmt: skip
    assert len(list(load_dataset(str(tmp_path / "out"), "popular", split="test", streaming=True))) == 2


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([question(1, "a", "cat", "yes"), question(1, "a", "dog", "no")], "line 2: question_id 1 occurs twice"),
        ([question(1, "a", "cat", "yes"), question(2, "a", "cat", "no")], "and not in another"),
        ([question(1, "a", "cat", "maybe")], "line 1"),
        ([question(1, "a", "cat", "yes"), '{"question_id": 2, "ima'], "line 2"),
        (['{"question_id": 1, "image": "a.jpg", "text": "Where is it?", "label": "no"}'], "Where is it"),
        ([], "no question"),
    ],
)
def test_damaged_or_contradictory_files_are_refused(tmp_path, capsys, lines, words):
    (tmp_path / "random.json").write_text("\n".join(lines))
    status, payload = build(tmp_path, capsys, random=tmp_path / "random.json")
    assert status == 2 and words in payload["error"] and not (tmp_path / "out").exists()


def test_nothing_given(tmp_path, capsys):
    status, payload = build(tmp_path, capsys)
    assert status == 2 and "--random" in payload["error"]


def test_published_questions(tmp_path, capsys):
    if not SHARED.is_dir():
        pytest.skip("the published questions are not here (shared/data/pope)")
    settings = ("random", "popular", "adversarial")
    files = {name: SHARED / f"coco_pope_{name}.json" for name in settings}
    status, payload = build(tmp_path, capsys, **files)
    assert status == 0 and payload["rows"] == {s: {"test": 3000} for s in settings} | {"objects": {"test": 500}}
    truths = defaultdict(set)
    for path in files.values():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            truths[row["image"].split(".")[0], row["label"]].add(row["text"])
    for row in load_dataset(str(tmp_path / "out"), "objects", split="test", cache_dir=str(tmp_path / "cache")):
        assert len(row["present"]) == len(truths[row["image_id"], "yes"])
        assert len(row["absent"]) == len(truths[row["image_id"], "no"])
