"""Readers of annotated pictures on small files: boxes, masks, crowds, repeated names, splits, and broken files."""

import json

import numpy as np
import pytest
from PIL import Image

from dualstream.analysis.annotated_images import SPLITS, open_annotated, split_of
from dualstream.analysis.annotation_files import decode_segmentation
from dualstream.data_builders.scenes import make_scene, rasterize

WIDTH, HEIGHT = 40, 24  # not square on purpose


def picture(folder, name, size=(WIDTH, HEIGHT)):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(folder / name)


def coco_content():
    block = [0] * (WIDTH * HEIGHT)  # column-major, as COCO counts
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[2:10, 20:30] = True
    column_major = crowd.T.reshape(-1)
    borders = np.flatnonzero(np.diff(np.concatenate([[False], column_major])))
    counts = np.diff(np.concatenate([[0], borders, [len(block)]])).tolist()
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 3, "name": "Dog"}, {"id": 9, "name": "person"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 3,
                "bbox": [4, 6, 8, 10],
                "segmentation": [[4, 6, 12, 6, 12, 16, 4, 16]],
            },
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [30, 0, 100, 100]},
            {
                "id": 3,
                "image_id": 7,
                "category_id": 9,
                "bbox": [20, 2, 10, 8],
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
            },
            {"id": 4, "image_id": 7, "category_id": 9, "bbox": [5, 5, 0, 3]},
        ],
    }


@pytest.fixture
def coco(tmp_path):
    def write(content, **options):
        picture(tmp_path / "images", "a.png", **options)
        file = tmp_path / "instances.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return f"coco:{file}:{tmp_path / 'images'}"

    return write


def test_coco_instances_with_polygon_run_lengths_crowd_and_repeated_names(coco):
    (image,) = open_annotated(coco(coco_content()), split="all")
    assert image.name == "a.png" and image.image().size == image.size == (WIDTH, HEIGHT)
    assert [item.name for item in image.objects] == ["dog", "dog", "person"]  # the one without an area is left out
    assert [item.is_crowd for item in image.objects] == [False, False, True]
    assert image.objects[0].box == (4, 6, 12, 16)
    assert image.objects[1].box == (30, 0, 40, 24)  # clipped to the picture
    assert image.objects[1].mask is None
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[6:16, 4:12] = True
    assert np.array_equal(image.objects[0].mask, expected)
    crowd = image.objects[2].mask
    assert crowd.sum() == 80 and crowd[2:10, 20:30].all()


def test_compressed_run_lengths_are_those_of_the_mask():
    masks = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.4
    encoded = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    shape = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    assert np.array_equal(decode_segmentation(shape, (WIDTH, HEIGHT)), mask)


def broken(change):
    content = coco_content()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "instances.json is no JSON file"),
        ([], "no COCO instances file"),
        (broken(lambda c: c.pop("categories")), "no COCO instances file"),
        (broken(lambda c: c["images"].append(c["images"][0])), "image id 7 occurs twice"),
        (broken(lambda c: c["images"][0].pop("width")), "image 0 of instances.json has no width"),
        (broken(lambda c: c["annotations"][0].update(image_id=8)), "annotation 1 .* belongs to image 8"),
        (broken(lambda c: c["annotations"][1].update(category_id=8)), "annotation 2 .* category 8"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), "a box is four numbers"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4])), "no negative extent"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4])), "finite numbers"),
        (broken(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]])), "at least three points"),
        (broken(lambda c: c["annotations"][2]["segmentation"].update(size=[4, 4])), "annotation 3 .* size"),
        (broken(lambda c: c["annotations"][2]["segmentation"].pop("counts")), "needs size and counts"),
    ],
)
def test_broken_coco_files_are_named(coco, content, message):
    with pytest.raises(ValueError, match=message):
        open_annotated(coco(content), split="all")


def test_a_picture_of_another_size_or_none_is_an_error(coco, tmp_path):
    (image,) = open_annotated(coco(coco_content(), size=(30, 30)), split="all")
    with pytest.raises(ValueError, match="is 30 x 30 pixels; its annotation says 40 x 24"):
        image.image()
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"'a\.png' is not in the image folder"):
        image.image()


def gqa_source(tmp_path, graphs):
    picture(tmp_path / "images", "2354453.jpg")
    file = tmp_path / "graphs.json"
    file.write_text(json.dumps(graphs))
    return f"gqa:{file}:{tmp_path / 'images'}"


def test_gqa_scene_graphs_keep_objects_of_one_name_apart(tmp_path):
    bear = {"name": "Bear", "x": 1, "y": 2, "w": 10, "h": 12, "attributes": ["Brown", "furry"], "relations": []}
    source = gqa_source(
        tmp_path,
        {
            "2354453": {
                "width": WIDTH,
                "height": HEIGHT,
                "objects": {
                    "11": bear,
                    "12": {**bear, "x": 35, "w": 20, "attributes": []},
                    "13": {**bear, "name": "log", "x": 99},
                },
            }
        },
    )
    (image,) = open_annotated(source, split="all")
    assert [(item.name, item.box) for item in image.objects] == [("bear", (1, 2, 11, 14)), ("bear", (35, 2, 40, 14))]
    assert image.objects[0].attributes == ("brown", "furry")
    assert image.image().size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ([], "no file of scene graphs"),
        ({"1": {"width": 4, "objects": {}}}, "image 1 of graphs.json has no height"),
        ({"1": {"width": 4, "height": 4, "objects": []}}, "objects must map"),
        (
            {"1": {"width": 4, "height": 4, "objects": {"5": {"name": "x"}}}},
            "object 5 .* has no x, y, w, h",
        ),
    ],
)
def test_broken_scene_graphs_are_named(tmp_path, graphs, message):
    with pytest.raises(ValueError, match=message):
        open_annotated(gqa_source(tmp_path, graphs), split="all")


def test_whats_up_boxes(tmp_path):
    (tmp_path / "bbox.jsonl").write_text('{"image": "a_left_of_b", "bbox": {"a": [1, 2, 3, 4], "b": [5, 5, 9, 9]}}\n')
    picture(tmp_path / "images", "a_left_of_b.jpeg")
    (image,) = open_annotated(f"whatsup_b:{tmp_path}", split="all")
    assert [(item.name, item.box) for item in image.objects] == [("a", (1, 2, 3, 4)), ("b", (5, 5, 9, 9))]
    assert image.image().size == (WIDTH, HEIGHT)
    (tmp_path / "bbox.jsonl").write_text('{"image": "x", "bbox": {"a": [3, 2, 1, 4]}}')
    with pytest.raises(ValueError, match="box of 'a' in line 1"):
        open_annotated(f"whatsup_b:{tmp_path}", split="all")


def test_scenes_are_the_generator_s_own():
    images = open_annotated("scenes:validation:5:64", seed=1)
    assert len(images) == 5
    assert len(images[1:3]) == 2 and images[1:3][0].name == images[1].name
    image = images[2]
    scene = make_scene(int(image.name.split("/")[1]))
    raster = rasterize(scene, 64)
    assert image.scene == scene and np.array_equal(np.asarray(image.image()), raster.image)
    for item, thing, mask, box in zip(image.objects, scene.objects, raster.masks, raster.boxes, strict=True):
        assert (item.name, item.attributes) == (thing.shape, (thing.color, thing.texture))
        assert np.array_equal(item.mask, mask) and item.box == tuple(box)
    names = {open_annotated("scenes", limit=1, split=split)[0].name for split in ("train", "validation", "test")}
    assert len(names) == 3


def test_splits_are_disjoint_and_whole_and_limited_at_random(tmp_path):
    lines = [json.dumps({"image": f"p{number}", "bbox": {"a": [0, 0, 1, 1]}}) for number in range(200)]
    (tmp_path / "bbox.jsonl").write_text("\n".join(lines))
    source = f"whatsup_b:{tmp_path}"
    parts = {split: [image.name for image in open_annotated(source, split=split)] for split in SPLITS}
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == sorted(parts["all"])
    assert 80 <= len(parts["test"]) <= 120
    limited = [image.name for image in open_annotated(source, limit=10)]
    assert limited == parts["test"][:10] and limited != sorted(limited)
    assert {split_of("p1", seed) for seed in range(30)} == {"train", "validation", "test"}


def test_a_folder_of_pictures_has_no_objects(tmp_path):
    picture(tmp_path / "photos", "b.png")
    picture(tmp_path / "photos", "a.jpg")
    images = open_annotated(tmp_path / "photos")
    assert [image.name for image in images] == ["a.jpg", "b.png"]
    assert images[0].objects == () and images[0].image().size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "data='nowhere' is no source"),
        ("coco:x.json:y", {}, "needs coco:FILE.json:IMAGE_FOLDER"),
        ("gqa:x.json", {}, "needs gqa:FILE.json:IMAGE_FOLDER"),
        ("scenes:test:none", {}, "names no scenes"),
        ("scenes:best:3", {}, "split is 'best'"),
        ("scenes", {"split": "all"}, "split is 'all'"),
        ("scenes", {"split": "dev"}, "split='dev'; accepted are"),
        ("scenes", {"limit": 0}, "limit must be at least 1"),
    ],
)
def test_unknown_sources_and_options_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        open_annotated(source, **options)


def test_an_empty_split_says_so(tmp_path):
    (tmp_path / "bbox.jsonl").write_text('{"image": "x", "bbox": {"a": [0, 0, 1, 1]}}')
    empty = next(split for split in SPLITS if split not in ("all", split_of("x")))
    with pytest.raises(ValueError, match=f"split='{empty}' .* is empty"):
        open_annotated(f"whatsup_b:{tmp_path}", split=empty)
