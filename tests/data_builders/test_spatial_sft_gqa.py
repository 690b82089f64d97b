"""GQA: whole-word filter on adversarial questions, held-out pictures by id, pixels and looks, selection, command."""

import json

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualstream.cli import main
from dualstream.data_builders.spatial_sft import GqaFolder, HeldOut, difference_hash, is_spatial, select
from dualstream.data_builders.spatial_sft.gqa import split_of
from dualstream.data_builders.spatial_sft.held_out import read_ids

SPATIAL = [
    ("Left of the man, what is there?", "dog"),
    ("What is to the left of the laptop?", "mouse"),
    ("Is the dog on the right?", "yes"),
    ("Is the cat left or right of the bed?", "left"),
    ("On which side of the photo is the woman?", "right"),
    ("Which side of the image is the cloud on, the top or the bottom?", "top"),
    ("Is the plate in the bottom part of the image?", "no"),
    ("What is at the top of the picture?", "kite"),
    ("What is on top of the countertop?", "bowl"),
    ("Who is in front of the overcast sky?", "man"),
    ("What is behind the bright lamp?", "wall"),
    ("Is there a cup next to the leftovers?", "yes"),
    ("What animal is under the table top?", "cat"),
    ("What hangs above the bed?", "lamp"),
    ("What is BETWEEN the chairs?", "table"),
    ("Which object is the leftmost?", "vase"),
    ("Where is the bird?", "left"),
]
OTHER = [
    ("What is the laptop made of?", "plastic"),
    ("Is the lamp bright?", "yes"),
    ("How is the weather?", "overcast"),
    ("Is the sky overcast?", "no"),
    ("What color is the countertop?", "black"),
    ("Is the field covered in clover?", "yes"),
    ("What topping is on the pizza?", "cheese"),
    ("What is the man wearing on his head?", "top hat"),
    ("What is the woman wearing?", "tank top"),
    ("What is she wearing?", "top"),
    ("Is the woman's top striped?", "yes"),
    ("What color are the bikini bottoms?", "bottom"),
    ("How much of the cake is left?", "half"),
    ("Are there any leftovers?", "yes"),
    ("Has the train left?", "no"),
    ("Is the building under construction?", "yes"),
    ("Is the answer right?", "yes"),
    ("Is everyone all right?", "yes"),
    ("What are the eggs like?", "over easy"),
    ("Is the underwear white?", "yes"),
    ("Is this a hangover?", "no"),
    ("Does the copyright mark show?", "no"),
]


@pytest.mark.parametrize(("question", "answer"), SPATIAL)
def test_spatial_questions_are_found(question, answer):
    assert is_spatial(question, answer)
    assert is_spatial(f"  {question.upper()} ", answer.capitalize())


@pytest.mark.parametrize(("question", "answer"), OTHER)
def test_words_that_only_look_spatial_are_not(question, answer):
    assert not is_spatial(question, answer)


@given(
    st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=4), st.sampled_from(["left", "right", "over", "above"])
)
def test_a_relation_inside_a_longer_word_never_counts(letters, word):
    assert not is_spatial(f"Is it a {letters}{word}{letters}?", f"{word}{letters}")


def photograph(seed, size=(64, 48)):
    """Smooth blobs: unlike noise, they survive JPEG compression as a photograph does."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def question(image, text, answer, objects=()):
    named = {str(i): name for i, name in enumerate(objects)}
    return {"imageId": image, "question": text, "answer": answer, "annotations": {"question": named}}


@pytest.fixture
def gqa(tmp_path):
    """30 pictures; 0 repeats a question, 1 is in the test set, 2 is missing, 3 is corrupt, 4 has the pixels of 5."""
    folder = tmp_path / "GQA"
    for name in ("questions", "sceneGraphs", "images"):
        (folder / name).mkdir(parents=True)
    train, graphs = {}, {}
    for i in range(30):
        image = f"{2300000 + i}"
        if i != 2:
            photograph(5 if i == 4 else i).save(folder / "images" / f"{image}.jpg", quality=95)
        train[f"a{i}"] = question(image, "What is left of the man?", "dog", ["77"])
        train[f"b{i}"] = question(image, "What color is the laptop?", "red")
        train[f"c{i}"] = question(image, "Is the sky bright?", "yes")
        train[f"d{i}"] = question(image, "Is the cat above the chair?", "no", ["78", "404"])
        boxes = {"77": ("man", 1, 2, 10, 20), "78": ("cat", 3, 4, 5, 6)}
        objects = {k: {"name": n, "x": x, "y": y, "w": w, "h": h} for k, (n, x, y, w, h) in boxes.items()}
        graphs[image] = {"width": 64, "height": 48, "objects": objects}
    train["e0"] = question("2300000", "what is left of  the MAN?", "dog")
    (folder / "images" / "2300003.jpg").write_bytes(b"no picture")
    test = {"t": question("2300001", "Where is it?", "left")}
    (folder / "questions" / "train_balanced_questions.json").write_text(json.dumps(train))
    (folder / "questions" / "testdev_balanced_questions.json").write_text(json.dumps(test))
    (folder / "sceneGraphs" / "train_sceneGraphs.json").write_text(json.dumps(graphs))
    return folder


def test_content_is_recognised_after_renaming_resizing_and_recompression(tmp_path):
    original = photograph(0, (320, 240))
    original.save(tmp_path / "secret.png")
    held_out = HeldOut(images=[tmp_path / "secret.png"])
    assert held_out.reason("secret") == "id"
    assert held_out.reason("other", original) == "pixels"
    original.resize((200, 150)).save(tmp_path / "again.jpg", quality=60)
    assert held_out.reason("other", Image.open(tmp_path / "again.jpg").convert("RGB")) == "near"
    assert [held_out.reason("other", photograph(seed)) for seed in range(1, 40)] == [None] * 39
    assert len(difference_hash(original)) == 8


def test_selection_leaves_out_what_it_must_and_says_why(gqa):
    source = GqaFolder(gqa)
    photograph(7).save(gqa / "elsewhere.png")
    held_out = HeldOut(source.test_ids(), [gqa / "elsewhere.png"])
    chosen = select(source, held_out, {"train": 999, "validation": 999, "test": 999})
    questions = [q for split in chosen.splits.values() for q in split]
    images = {q.image_id for q in questions}
    assert {"2300001", "2300002", "2300003", "2300007"}.isdisjoint(images)
    assert len({"2300004", "2300005"} & images) == 1
    assert chosen.left_out == {
        "not spatial": 60,
        "repeated": 1,
        "id": 1,
        "no image file": 1,
        "unreadable": 1,
        "near": 1,
        "same pixels, other id": 1,
    }
    assert all(is_spatial(q.question, q.answer) for q in questions)
    others = select(source, held_out, {"train": 999}, spatial=False).splits["train"]
    assert {q.question for q in others} == {"What color is the laptop?", "Is the sky bright?"}


def test_splits_share_no_picture_whatever_is_asked_for(gqa):
    source, held_out = GqaFolder(gqa), HeldOut()
    of = {}
    for spatial in (True, False):
        for sizes in ({"train": 9, "validation": 9, "test": 9}, {"test": 2, "train": 50}):
            for split, questions in select(source, held_out, sizes, spatial=spatial).splits.items():
                assert len(questions) <= sizes[split]
                for q in questions:
                    assert of.setdefault(q.image_id, split) == split == split_of(q.image_id)
    shares = [split_of(str(i)) for i in range(4000)]
    assert abs(shares.count("test") / 4000 - 0.05) < 0.012 and abs(shares.count("validation") / 4000 - 0.05) < 0.012


def test_no_picture_gives_more_questions_than_allowed_and_the_seed_changes_the_order(gqa):
    source, held_out = GqaFolder(gqa), HeldOut()
    one = select(source, held_out, {"train": 99}, per_image=1).splits["train"]
    assert len({q.image_id for q in one}) == len(one)
    again = select(source, held_out, {"train": 99}, per_image=1).splits["train"]
    other = select(source, held_out, {"train": 99}, per_image=1, seed=1).splits["train"]
    assert one == again and [q.id for q in one] != [q.id for q in other]


def build(capsys, *arguments):
    code = main(["build", "spatial-sft", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out)


def test_command_writes_a_folder_that_load_dataset_reads(gqa, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = ("--source", "gqa", "--gqa", gqa, "--out", out, "--train", 20, "--validation", 5, "--test", 5)
    code, result = build(capsys, *arguments)
    assert code == 0 and result["configs"]["spatial"]["train"] == 20
    rows = load_dataset(str(out), "spatial", split="train", cache_dir=str(tmp_path / "cache"))
    row = rows[0]
    assert row["images"][0].size == (64, 48)
    user, assistant = row["messages"]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"].startswith(row["question"] + "\n")
    assert assistant["content"][0]["text"] == row["answer"]
    named = {entry["name"]: entry["box"] for row in rows for entry in row["objects"]}
    assert named == {"man": [1, 2, 11, 22], "cat": [3, 4, 8, 10]}  # an object without a scene-graph entry is left out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "config_name: spatial" in card and "not spatial: 60" in card


def test_scenes_build_goes_on_after_a_kill_and_refuses_other_settings(tmp_path, capsys, monkeypatch):
    from dualstream.data_builders.spatial_sft import command

    monkeypatch.setitem(command.SHARD_UNITS, "scenes", 2)
    out = tmp_path / "set"
    arguments = ("--out", out, "--train", 5, "--validation", 2, "--test", 0, "--size", 32)
    code, result = build(capsys, *arguments)
    assert code == 0
    assert result["configs"] == {
        "spatial": {"train": 20, "validation": 8, "test": 0},
        "non_spatial": {"train": 5, "validation": 2, "test": 0},
    }
    shards = sorted((out / "spatial").glob("train-*.parquet"))
    assert len(shards) == 3
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].unlink()  # what a kill leaves: one shard missing, half of another file
    (out / "spatial" / "train-00001-of-00003.partial").write_bytes(b"half")
    assert build(capsys, *arguments)[0] == 0
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in before.items()}
    assert [after[path][1] == before[path][1] for path in shards] == [True, False, True]
    code, result = build(capsys, *arguments[:-1], 40)
    assert code == 2 and "size: 32 there, 40 asked for" in result["error"]
    rows = load_dataset(str(out), "spatial", split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["images"][0].size == (32, 32) and len(set(rows["set_id"])) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--source", "gqa", "--out", "{tmp}/x"), "--gqa DIR"),
        (("--source", "gqa", "--gqa", "{tmp}", "--out", "{tmp}/x"), "train_balanced_questions.json"),
        (("--out", "{tmp}/full"), "choose a new folder"),
        (("--out", "{tmp}/x", "--train", "-1"), "--train is -1"),
        (("--out", "{tmp}/x", "--train", "0", "--validation", "0", "--test", "0"), "at least one row"),
        (("--source", "gqa", "--gqa", "{gqa}", "--out", "{tmp}/x", "--exclude-ids", "{tmp}/no.txt"), "no.txt"),
        (("--source", "gqa", "--gqa", "{gqa}", "--out", "{tmp}/x", "--exclude-images", "{tmp}/no"), "no folder with"),
    ],
)
def test_bad_input_is_explained(gqa, tmp_path, capsys, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    code, result = build(capsys, *(a.format(tmp=tmp_path, gqa=gqa) for a in arguments))
    assert code == 2 and words in result["error"]


def test_ids_are_read_from_lines_lists_and_questions(tmp_path):
    (tmp_path / "a.txt").write_text("12\n\n 34 \n")
    (tmp_path / "b.json").write_text('[12, "34"]')
    (tmp_path / "c.json").write_text(json.dumps({"q": {"imageId": "12"}, "r": {"imageId": "34"}}))
    assert all(read_ids(tmp_path / name) == {"12", "34"} for name in ("a.txt", "b.json", "c.json"))
    (tmp_path / "d.json").write_text('{"q": {}}')
    with pytest.raises(ValueError, match="imageId"):
        read_ids(tmp_path / "d.json")
