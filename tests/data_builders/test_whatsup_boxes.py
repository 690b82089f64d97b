"""What's Up boxes: two published sources made one, what is refused, and the dataset that comes out."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualstream import cli
from dualstream.data_builders.whatsup_boxes import (
    RELATIONS,
    Annotation,
    InconsistentError,
    Stem,
    agrees_with_relation,
    read_jsonl,
    read_voc,
    unify,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "whatsup_b"
BOXES = {"left_of": (10, 40), "right_of": (60, 40), "in-front_of": (35, 60), "behind": (35, 20)}


def voc(boxes, size=(100, 100), file_name="x.jpeg", extra=""):
    objects = "".join(
        f"<object><name>{name}</name><truncated>0</truncated><bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box in boxes.items()
    )
    return (
        f"{extra}<annotation><filename>{file_name}</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"</size>{objects}</annotation>"
    )


@pytest.fixture
def sources(tmp_path):
    """A complete set of four pictures in both forms, and the pictures."""
    lines = []
    for folder in ("voc", "images"):
        (tmp_path / folder).mkdir()
    for number, (relation, (x, y)) in enumerate(BOXES.items()):
        stem, boxes = f"cup_{relation}_tape", {"cup": [x, y, x + 20, y + 20], "tape": [38, 42, 58, 62]}
        lines.append(json.dumps({"image": stem, "bbox": boxes}))
        (tmp_path / "voc" / f"{stem}.xml").write_text(voc(boxes, file_name=f"{stem}.jpeg"))
        pixels = np.full((100, 100, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{stem}.jpeg")
    (tmp_path / "boxes.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def load(folder):
    # A cache of its own: datasets takes folders of the same name for the same dataset.
    return load_dataset(str(folder), split="test", cache_dir=str(folder.parent / "cache"))


def build(sources, *options, capsys):
    arguments = ["build", "whatsup-bboxes", "--jsonl", str(sources / "boxes.jsonl"), "--json"]
    status = cli.main([*arguments, "--voc-xml", str(sources / "voc"), "--out", str(sources / "out"), *options])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if status == 0 else captured.err + captured.out


def test_a_build_is_a_typed_dataset_with_the_pictures_as_published(sources, capsys):
    status, payload = build(sources, "--images", str(sources / "images"), capsys=capsys)
    assert status == 0
    assert (payload["rows"], payload["complete_sets"], payload["complete_pairs"]) == (4, 1, 2)
    assert payload["findings"] == []
    rows = load(sources / "out")
    assert [row["image_id"] for row in rows] == sorted(f"cup_{relation}_tape" for relation in BOXES)
    behind = rows[0]
    assert rows.features["relation"].int2str(behind["relation"]) == "behind"
    assert (behind["subject_box"], behind["reference_box"]) == ([35, 20, 55, 40], [38, 42, 58, 62])
    assert behind["caption"] == "A cup behind a tape"
    assert rows.features["box_source"].int2str(behind["box_source"]) == "both"
    stored = rows.cast_column("image", type(rows.features["image"])(decode=False))
    published = (sources / "images" / "cup_behind_tape.jpeg").read_bytes()
    assert stored[0]["image"]["bytes"] == published
    streamed = next(iter(load_dataset(str(sources / "out"), split="test", streaming=True)))
    assert streamed["image"].size == (100, 100) and streamed["set_id"] == "cup|tape"


def test_the_same_sources_give_the_same_bytes_and_other_ones_are_refused(sources, capsys):
    assert build(sources, capsys=capsys)[0] == 0
    first = {path.name: path.read_bytes() for path in (sources / "out").rglob("*") if path.is_file()}
    assert build(sources, capsys=capsys)[0] == 0
    assert {path.name: path.read_bytes() for path in (sources / "out").rglob("*") if path.is_file()} == first
    (sources / "boxes.jsonl").write_text((sources / "boxes.jsonl").read_text().replace("[38, 42", "[39, 42"))
    status, message = build(sources, capsys=capsys)
    assert status == 2 and "other settings" in message
    assert {path.name: path.read_bytes() for path in (sources / "out").rglob("*") if path.is_file()} == first


def test_every_disagreement_is_found_and_resolved_by_its_rule():
    fine = {"cup": (10, 40, 30, 60), "tape": (38, 42, 58, 62)}
    jsonl = [
        ("cup_left_of_tape", Annotation(fine)),
        ("cup_left_of_tape", Annotation(fine)),
        ("cup_behind_tape", Annotation({"cup": (35, 20, 55, 40), "tape": (38, 42, 58, 62)})),
        ("cup_in-front_of_tape", Annotation({"cup": (35, 60, 55, 60), "tape": (38, 42, 58, 62)})),
    ]
    size, in_front = (100, 100), {"cup": (35, 60, 55, 80), "tape": (38, 42, 58, 62)}
    voc_rows = [
        ("cup_left_of_tape", Annotation({"can": fine["cup"], "tape": fine["tape"]}, size, frozenset({"can"}))),
        ("cup_behind_tape", Annotation({"cup": (35, 21, 55, 41), "tape": (38, 42, 58, 62)}, size)),
        ("cup_in-front_of_tape", Annotation(in_front, size, file_name="y.jpg")),
        ("cup_right_of_tape", Annotation({"cup": (10, 40, 30, 60), "tape": (38, 42, 58, 62)}, size)),
    ]
    pictures, findings = unify(jsonl, voc_rows)
    by_stem = {picture.stem: picture for picture in pictures}
    assert {(f.image, f.kind, f.source) for f in findings} == {
        ("cup_left_of_tape", "repeated line", "jsonl"),
        ("cup_left_of_tape", "renamed", "voc"),
        ("cup_behind_tape", "boxes differ", "both"),
        ("cup_in-front_of_tape", "bad box", "jsonl"),
        ("cup_in-front_of_tape", "file name", "voc"),
        ("cup_right_of_tape", "one source", "voc"),
        ("cup_right_of_tape", "against relation", "voc"),
    }
    assert by_stem["cup_left_of_tape"].sources == "both" and by_stem["cup_left_of_tape"].truncated == (True, False)
    assert by_stem["cup_behind_tape"].boxes[0] == (35, 21, 55, 41) and by_stem["cup_behind_tape"].sources == "voc"
    assert by_stem["cup_in-front_of_tape"].boxes[0] == (35, 60, 55, 80)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("cup_left_of_tape", {"mug": (1, 1, 2, 2), "can": (1, 1, 2, 2)})], "wanted are cup, tape"),
        ([("cup_left_of_tape", {"cup": (1, 1, 2, 2)})], "objects cup; wanted"),
        ([("cup_left_of_tape", {"cup": (5, 5, 5, 9), "tape": (1, 1, 2, 2)})], "no source has two boxes"),
        ([("cup_left_of_tape", {"cup": (-1, 5, 6, 9), "tape": (1, 1, 2, 2)})], "no source has two boxes"),
        ([("cup_left_of_tape", {"cup": (1, 1, n, 2), "tape": (1, 1, 2, 2)}) for n in (4, 5)], "two different"),
    ],
)
def test_what_no_rule_resolves_is_refused(rows, words):
    with pytest.raises(InconsistentError, match=words):
        unify([(stem, Annotation(boxes)) for stem, boxes in rows], None)


def test_a_refused_build_leaves_nothing(sources, capsys):
    (sources / "voc" / "cup_behind_tape.xml").write_text(voc({"cup": (35, 20, 55, 400), "tape": (1, 1, 2, 2)}))
    (sources / "boxes.jsonl").unlink()
    status = cli.main(["build", "whatsup-bboxes", "--voc-xml", str(sources / "voc"), "--out", str(sources / "out")])
    assert status == 2 and "no source has two boxes" in capsys.readouterr().err
    assert not (sources / "out").exists()


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
GOOD = {"cup": (1, 1, 2, 2), "tape": (3, 3, 4, 4)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (voc(GOOD, extra=BOMB, file_name="&b;"), "document type"),
        (voc(GOOD, extra=OUTSIDE, file_name="&a;"), "document type"),
        (voc(GOOD)[:-20], "no Pascal-VOC"),
        (voc(GOOD).replace("<ymax>2</ymax>", ""), "bndbox/ymax"),
        (voc(GOOD).replace("<xmin>1</xmin>", "<xmin>1.5</xmin>"), "whole pixels"),
        (voc(GOOD).replace("tape", "cup"), "twice"),
        ("<a>" + " " * 1_000_001 + "</a>", "at most"),
        ("", "no Pascal-VOC"),
    ],
)
def test_hostile_or_damaged_xml_is_refused(tmp_path, content, words):
    path = tmp_path / "cup_behind_tape.xml"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_voc(path)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "boxes.jsonl"
    good = {"image": "cup_behind_tape", "bbox": {"cup": [1, 1, 2, 2], "tape": [1, 1, 2, 2]}}
    for bad in (
        '{"image": "cup_be',
        "[]",
        '{"image": "a", "bbox": {"cup": [1, 2]}}',
        '{"image": "a", "bbox": {"c": null}}',
    ):
        path.write_text(json.dumps(good) + "\n\n" + bad + "\n")
        with pytest.raises(ValueError, match="line 3"):
            list(read_jsonl(path))


def test_pictures_that_are_missing_broken_or_of_another_size_are_all_named(sources, capsys):
    images = sources / "images"
    (images / "cup_behind_tape.jpeg").write_bytes((images / "cup_behind_tape.jpeg").read_bytes()[:300])
    Image.new("RGB", (50, 100)).save(images / "cup_left_of_tape.jpeg")
    status, message = build(sources, "--images", str(images), capsys=capsys)
    assert status == 2 and "cup_behind_tape" in message and "50 x 100" in message
    (images / "cup_right_of_tape.jpeg").unlink()
    status, message = build(sources, "--images", str(images), capsys=capsys)
    assert status == 2 and "lacks 1 of 4" in message and not (sources / "out").exists()


NAMES = st.from_regex(r"[a-zé][a-z-]{0,8}", fullmatch=True)


@given(subject=NAMES, reference=NAMES, relation=st.sampled_from(sorted(RELATIONS)))
def test_a_stem_is_read_back(subject, reference, relation):
    stem = Stem.parse(f"{subject}_{relation}_{reference}")
    assert (stem.subject, stem.relation, stem.reference) == (subject, RELATIONS[relation], reference)


CORNERS = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(41, 90), st.integers(41, 90))
OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front", "on": "under", "under": "on"}


@given(first=CORNERS, second=CORNERS, relation=st.sampled_from(sorted(OPPOSITE)))
def test_swapped_objects_stand_in_the_opposite_relation(first, second, relation):
    holds = agrees_with_relation(relation, first, second)
    assert agrees_with_relation(OPPOSITE[relation], second, first) == holds
    assert not (holds and agrees_with_relation(OPPOSITE[relation], first, second))


@pytest.mark.parametrize("given_sources", [("jsonl",), ("voc",), ("jsonl", "voc")])
def test_published_boxes(tmp_path, capsys, given_sources):
    if not SHARED.is_dir():
        pytest.skip("the published annotations are not here (shared/data/whatsup_b)")
    paths = {"jsonl": ("--jsonl", str(SHARED / "bbox.jsonl")), "voc": ("--voc-xml", str(SHARED / "voc_xml"))}
    options = [word for source in given_sources for word in paths[source]]
    assert cli.main(["build", "whatsup-bboxes", *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert (payload["rows"], payload["complete_sets"]) == (408, 102)
    assert set(payload["relations"].values()) == {102}
    renamed = {("cap_right_of_fork", "renamed"), ("cup_left_of_candle", "renamed")}
    assert {(f["image"], f["kind"]) for f in payload["findings"]} == (renamed if "voc" in given_sources else set())
    rows = load(tmp_path / "out")
    sizes = {(row["width"], row["height"]) for row in rows}
    assert sizes == ({(1280, 960)} if "voc" in given_sources else {(None, None)})
