"""Items from annotation files: counts and pairs of the real ones where they are there, and what is said when not."""

import collections
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from dualstream.eval.spatial_tasks import (
    TASKS,
    MissingDataError,
    judge_orders,
    judge_text,
    load_items,
    make_docs,
    open_image,
    scoring,
)
from dualstream.eval.spatial_tasks.data_folder import SOURCES, Source
from dualstream.eval.spatial_tasks.whats_up import stated_relation

REAL = Path(os.environ.get("DUALSTREAM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (REAL / "vsr").is_dir(), reason="no annotation files: set DUALSTREAM_DATA or put them in ../shared/data"
)
COUNTS = {
    "whatsup_a": 412,
    "whatsup_b": 408,
    "coco_spatial_one": 2247,
    "coco_spatial_two": 440,
    "gqa_spatial_one": 1160,
    "gqa_spatial_two": 291,
    "vsr_random": 2195,
    "vsr_zeroshot": 1222,
}


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setenv("DUALSTREAM_STAND_IN_IMAGES", "1")


@needs_data
@pytest.mark.parametrize("task", COUNTS)
def test_real_annotations_count_as_published_and_a_constant_letter_is_at_chance(task, stand_ins):
    items, _ = load_items(task, REAL)
    assert len(items) == COUNTS[task] and len({item.id for item in items}) == len(items)
    if TASKS[task].sets:
        sets = collections.Counter(item.set_id for item in items)
        pairs = collections.defaultdict(set)
        for item in items:
            pairs[item.pair_id].add(item.relations[item.answer])
        assert set(sets.values()) == {4} and len(pairs) == len(items) // 2
        assert all(len(relations) == 2 for relations in pairs.values())
    rows = make_docs(task, "fair", REAL)
    for row in rows:  # an answerer that always says A
        row |= {"losses": [0.0] + [1.0] * (len(row["choices"]) - 1), "greedy": [True, False, False, False]}
    verdicts = judge_orders(rows)
    assert len(verdicts) == COUNTS[task]
    assert scoring.individual(verdicts) == pytest.approx(1 / len(items[0].options))


@needs_data
@pytest.mark.parametrize("task", COUNTS)
def test_every_real_item_is_asked_with_the_published_prompt(task, stand_ins):
    items, _ = load_items(task, REAL)
    captions = {}
    if task.startswith("vsr"):
        file = REAL / "vsr" / task.removeprefix("vsr_") / "test.jsonl"
        captions = dict(enumerate(json.loads(line)["caption"] for line in file.read_text().splitlines()))
    gap = " " * 12
    for number, (item, doc) in enumerate(zip(items, make_docs(task, "paper", REAL), strict=True)):
        assert doc["item"] == item.id
        if captions:
            expected = (
                f"\n{gap}Please check if the following description is correct:\n\n\n"
                f"{gap}Description: {captions[number]}\n\n\n"
                f'{gap}Please answer with either "True" or "False".\n{gap}Your answer is:\n{gap}'
            )
        else:
            options = [item.options[place] for place in doc["shown"]]
            lines = "".join(f"\n{gap}{letter}: {text}\n" for letter, text in zip("ABCDEF", options, strict=False))
            letters = ", ".join("ABCDEF"[: len(options) - 1]) + " or " + "ABCDEF"[len(options) - 1]
            expected = (
                f"\n{gap}Please choose the best decription for the image from the following {len(options)} options:\n"
                f"{lines}\n{gap}Please answer with {letters}.\nYour answer is:\n{gap}"
            )
            assert sorted(doc["shown"]) == list(range(len(options)))
        assert doc["prompt"] == expected


@needs_data
def test_whats_up_pictures_are_those_of_the_boxes(stand_ins):
    boxes = {json.loads(line)["image"] for line in (REAL / "whatsup_b" / "bbox.jsonl").read_text().splitlines()}
    items, _ = load_items("whatsup_b", REAL)
    assert {Path(item.image).stem for item in items} == boxes


@needs_data
@pytest.mark.parametrize(("task", "best"), [("coco_spatial_one", 1.0), ("gqa_spatial_one", 0.506)])
def test_the_published_order_gives_coco_away_to_a_constant_letter(task, best, stand_ins):
    verdicts = [judge_text(doc, "A") for doc in make_docs(task, "paper", REAL)]
    assert scoring.constant(verdicts) == pytest.approx(best, abs=5e-4)
    assert scoring.individual(verdicts) == pytest.approx(best, abs=5e-4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small benchmark in the layout of the real ones, pictures included."""
    root = tmp_path / "data"
    pictures = root / "whatsup" / "controlled_images"
    pictures.mkdir(parents=True)
    captions = {
        "left_of": "A mug to the left of a table",
        "right_of": "A mug to the right of a table",
        "on": "A mug on a table",
        "under": "A mug under a table",
    }
    rows = []
    for relation, caption in captions.items():
        Image.new("RGB", (8, 8)).save(pictures / f"mug_{relation}_table.jpeg")
        others = [text for text in captions.values() if text != caption]
        rows.append(
            {"image_path": f"data/controlled_images/mug_{relation}_table.jpeg", "caption_options": [caption, *others]}
        )
    (root / "whatsup" / "controlled_images_dataset.json").write_text(json.dumps(rows))
    val = root / "coco" / "val2017"
    val.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(val / "000000000139.jpg")
    photo = [139, "A photo of a cat on the left", "A photo of a cat on the right"]
    (root / "whatsup" / "coco_qa_one_obj.json").write_text(json.dumps([photo]))
    (root / "vsr" / "random").mkdir(parents=True)
    statement = {"image": "x.jpg", "caption": "The cat is on the mat.", "label": 0, "relation": "on"}
    (root / "vsr" / "random" / "test.jsonl").write_text(json.dumps(statement) + "\n")
    for name, count in (("whatsup_a", 4), ("coco_spatial_one", 1), ("vsr_random", 1)):
        source = SOURCES[name]
        monkeypatch.setitem(SOURCES, name, Source(source.annotations, source.images, count))
    return root


def test_official_annotations_and_pictures(folder):
    docs = make_docs("whatsup_a", "paper", folder)
    assert [doc["relations"][0] for doc in docs] == ["left", "right", "on", "under"]
    assert {doc["set_id"] for doc in docs} == {"whatsup_a/mug/table"}
    assert len({doc["pair_id"] for doc in docs}) == 2
    for doc in docs:
        assert doc["options"][doc["shown"]["ABCD".index(doc["target"])]] == doc["options"][0]
        assert open_image(doc["image"]).size == (8, 8)
    verdicts = [judge_text(doc, doc["target"]) for doc in docs]
    assert scoring.whole_set(verdicts) == scoring.pair(verdicts) == scoring.flip(verdicts) == 1
    assert scoring.invalid([judge_text(doc, "A.") for doc in docs]) == 1
    assert scoring.extra("tolerant", [judge_text(doc, f"({doc['target']})") for doc in docs]) == 1
    (doc,) = make_docs("coco_spatial_one", "paper", folder)
    assert doc["image"].endswith("val2017/000000000139.jpg") and doc["target"] == "A"


def test_what_is_missing_is_said(folder, monkeypatch):
    monkeypatch.delenv("DUALSTREAM_DATA", raising=False)
    monkeypatch.delenv("DUALSTREAM_STAND_IN_IMAGES", raising=False)
    with pytest.raises(MissingDataError, match="set DUALSTREAM_DATA"):
        load_items("whatsup_a")
    with pytest.raises(MissingDataError, match=r"whatsup_b: no annotations .* controlled_clevr_dataset\.json"):
        load_items("whatsup_b", folder)
    with pytest.raises(MissingDataError, match=r"no picture folder; looked for vsr/images"):
        load_items("vsr_random", folder)
    (folder / "whatsup" / "controlled_images" / "mug_on_table.jpeg").unlink()
    with pytest.raises(MissingDataError, match=r"1 of 4 pictures are not in .*: mug_on_table\.jpeg"):
        load_items("whatsup_a", folder)
    with pytest.raises(ValueError, match="task is 'vqa'; accepted are whatsup_a"):
        load_items("vqa", folder)
    with pytest.raises(ValueError, match="protocol is 'mine'"):
        make_docs("whatsup_a", "mine", folder)


def test_half_a_download_is_told_from_a_short_file(folder):
    path = folder / "whatsup" / "controlled_images_dataset.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is the download complete"):
        load_items("whatsup_a", folder)
    path.write_text(json.dumps(json.loads(whole)[:3]))
    with pytest.raises(ValueError, match="has 3 items, the complete benchmark has 4"):
        load_items("whatsup_a", folder)


def test_question_files_cannot_stand_in_where_they_do_not_name_the_pictures(folder, monkeypatch):
    monkeypatch.delenv("DUALSTREAM_STAND_IN_IMAGES", raising=False)
    (folder / "whatsup" / "coco_qa_one_obj.json").unlink()
    (folder / "prompts.jsonl").write_text(
        json.dumps({"question": "USER: Where is the cat in the photo? Answer ...", "answer": ["Top"]})
    )
    source = Source(("absent.json",), SOURCES["coco_spatial_one"].images, 1, prompts="prompts.jsonl")
    monkeypatch.setitem(SOURCES, "coco_spatial_one", source)
    with pytest.raises(MissingDataError, match=r"does not name the pictures; absent\.json does"):
        load_items("coco_spatial_one", folder)
    monkeypatch.setenv("DUALSTREAM_STAND_IN_IMAGES", "1")
    (item,), images = load_items("coco_spatial_one", folder)
    assert images is None and item.options == ("A photo of a cat on the top", "A photo of a cat on the bottom")


@pytest.mark.parametrize(
    ("description", "relation"),
    [
        ("A mug on a table", "on"),
        ("A mug to the left of a table", "left"),
        ("A photo of a cat on the left", "left"),
        ("A photo of a left shoe above a table.", "above"),
        ("A photo of a bright lamp to the right of a top hat", "right"),
        ("A mug in front of a knife", "front"),
        ("A photo of a cup on top of a shelf", "above"),
        ("A photo of a net behind", "behind"),
    ],
)
def test_relations_of_descriptions(description, relation):
    assert stated_relation(description) == relation


def test_a_description_without_relation_is_refused():
    with pytest.raises(ValueError, match="states none"):
        stated_relation("A bright laptop")


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("scenes_")])
def test_scenes_need_no_files_and_have_one_right_answer(task, monkeypatch):
    monkeypatch.setenv("DUALSTREAM_SCENES", "40")
    monkeypatch.delenv("DUALSTREAM_DATA", raising=False)
    paper, fair = make_docs(task, "paper"), make_docs(task, "fair")
    assert paper == make_docs(task, "paper") and len(paper) == 40
    assert all(judge_text(doc, doc["target"]).credit == 1 for doc in paper)
    assert len(judge_orders([row | {"losses": row["shown"], "greedy": row["shown"]} for row in fair])) == 40
    for row in fair:
        right = row["options"][row["answer"]]
        place = row["shown"].index(row["answer"])
        assert right in row["prompt"] or row["choices"][place] == right
    assert open_image(paper[0]["image"]).mode == "RGB"
    if task == "scenes_whatsup":
        assert len({row["prompt"] for row in fair[:4]}) == 4
        verdicts = [judge_text(doc, doc["target"]) for doc in paper]
        assert scoring.whole_set(verdicts) == scoring.flip(verdicts) == 1


@pytest.mark.parametrize("count", ["0", "-4", "6", "many"])
def test_a_number_of_scenes_that_makes_no_whole_sets_is_refused(count, monkeypatch):
    monkeypatch.setenv("DUALSTREAM_SCENES", count)
    with pytest.raises(ValueError, match="DUALSTREAM_SCENES is"):
        make_docs("scenes_whatsup", "fair")
