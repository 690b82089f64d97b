"""The public code's choices: index sets by hand (T18), its measured misalignment, scorers that fall into the traps."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject, open_annotated
from dualstream.analysis.causality.replication.neo2024 import (
    DEFECTS,
    cells_of_object,
    chosen_object,
    dilated,
    even_windows,
    first_piece,
    grid_side,
    judge,
    judge_trap,
    noise_picture,
    query,
    windows,
    yes_id,
)
from dualstream.analysis.causality.scorers import TRAPS, ClassWords, self_test
from dualstream.analysis.causality.targets import Target, stated_area
from dualstream.analysis.object_tokens import object_tokens
from dualstream.modeling import load_model
from dualstream.processing import register_processors, token_geometry


@pytest.fixture(scope="module")
def clip():
    """LLaVA-1.5's geometry: shorter side to 336, centre crop, 14-pixel patches: 24 x 24."""
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    tokenizer = load_model("tiny-llava", device="cpu")[1].tokenizer
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def thing(x1, y1, x2, y2, name="thing", outlined=True, **options):
    outline = ((x1, y1, x2, y1, x2, y2, x1, y2),) if outlined else ()
    return AnnotatedObject(name, (x1, y1, x2, y2), polygons=outline, **options)


def cells(*places, side=24):
    return [row * side + column for row, column in places]


# Worked out by hand. 640 x 427: crop 427 from x = 106, cells of 17 pixels (17.79 in truth). 500 x 333: crop from 83,
# cells of 13 (13.875). 480 x 640: crop from y = 80, cells of 20, exact.
FIXTURES = [
    ((640, 427), (106, 0, 123, 17), cells((0, 0))),
    ((640, 427), (106 + 16, 16, 106 + 18, 18), cells((0, 0), (0, 1), (1, 0), (1, 1))),
    ((640, 427), (106 + 340, 340, 106 + 374, 357), cells((20, 20), (20, 21))),
    ((640, 427), (106 + 391, 391, 106 + 408, 408), cells((23, 23))),
    ((640, 427), (106 + 410, 410, 106 + 425, 425), cells()),  # in the border that belongs to no cell
    ((500, 333), (83 + 130, 26, 83 + 156, 39), cells((2, 10), (2, 11))),
    ((480, 640), (40, 80 + 40, 80, 80 + 60), cells((2, 2), (2, 3))),
    ((100, 640), (0, 270, 4, 274), cells((0, 0))),  # crop 100 from y = 270, cells of 4
]


@pytest.mark.parametrize(("size", "box", "expected"), FIXTURES)
def test_index_sets_of_a_fixed_list(size, box, expected):
    assert cells_of_object(thing(*box), size, 24).tolist() == expected


def test_exact_sets_differ_where_they_should(clip):
    """Where the short side is a multiple of 24 both agree; elsewhere they drift apart towards the lower right."""
    differs = {}
    for size, box, expected in FIXTURES:
        exact = object_tokens(token_geometry(clip, size), box=box).tolist()
        differs[(size, box)] = exact != expected
    same = [size for (size, _), apart in differs.items() if not apart]
    assert same == [(640, 427), (640, 427), (480, 640), (100, 640)]  # the first cells, and where cells are exact
    far = token_geometry(clip, (640, 427)).tokens_of_box((106 + 391, 391, 106 + 408, 408))
    assert far.tolist() == cells((21, 21), (21, 22), (22, 21), (22, 22))  # a cell up and left of what the code takes


def ellipses(size, rng, count=120):
    """Masks of ellipses of 1000 to 2000 square pixels inside the middle square, two cells from its border."""
    width, height = size
    square = min(size)
    ys, xs = np.mgrid[:height, :width]
    while count:
        area, ratio = rng.uniform(1000, 2000), rng.uniform(0.5, 2)
        a, b = np.sqrt(area / np.pi * ratio), np.sqrt(area / np.pi / ratio)
        x = (width - square) / 2 + rng.uniform(a + 36, square - a - 36)
        y = (height - square) / 2 + rng.uniform(b + 36, square - b - 36)
        yield ((xs + 0.5 - x) / a) ** 2 + ((ys + 0.5 - y) / b) ** 2 <= 1
        count -= 1


@pytest.mark.parametrize(
    ("size", "recalls"),
    [((640, 480), (1.0, 1.0, 1.0)), ((640, 427), (0.73, 1.0, 1.0)), ((500, 375), (0.79, 1.0, 1.0)),
     ((500, 333), (0.67, 0.98, 1.0))],
)  # fmt: skip
def test_the_measured_misalignment_comes_out(clip, size, recalls):
    """Share of true object tokens that the public geometry takes at 0, 1, 2 rings, as its own functions measured."""
    rng = np.random.default_rng(0)
    geometry = token_geometry(clip, size)
    found, sizes = [], []
    for mask in ellipses(size, rng):
        item = AnnotatedObject("x", (0, 0, 1, 1), read_mask=lambda mask=mask: mask)
        own, exact = cells_of_object(item, size, 24), object_tokens(geometry, mask)
        sets = [dilated(own, rings, 24) for rings in (0, 1, 2)]
        truths = [exact] * 3
        found.append([np.isin(truth, taken).mean() for truth, taken in zip(truths, sets, strict=True)])
        sizes.append([len(taken) for taken in sets])
    assert np.mean(found, axis=0) == pytest.approx(recalls, abs=0.05)
    if size == (640, 427):
        assert np.mean(sizes, axis=0) == pytest.approx((10.6, 27.5, 49.9), rel=0.1)


@given(st.sets(st.integers(0, 35), max_size=8), st.integers(0, 4))
def test_dilation_is_a_chebyshev_ball_on_the_grid(chosen, rings):
    taken = dilated(np.array(sorted(chosen), dtype=int), rings, 6)
    places = [divmod(cell, 6) for cell in chosen]
    expected = [
        cell
        for cell in range(36)
        if any(max(abs(cell // 6 - row), abs(cell % 6 - column)) <= rings for row, column in places)
    ]
    assert taken.tolist() == expected


def test_outlines_lose_vertices_beyond_the_crop_and_short_ones_are_dropped():
    whole = thing(90, 20, 140, 60)  # the left edge lies beyond the crop, which begins at 106
    assert cells_of_object(whole, (640, 427), 24).size == 0  # two vertices left: no outline
    clipped = AnnotatedObject("x", (90, 20, 140, 60), polygons=((90, 20, 140, 20, 140, 60, 110, 60, 90, 50),))
    taken = cells_of_object(clipped, (640, 427), 24)
    exact = cells_of_object(thing(106, 20, 140, 60), (640, 427), 24)
    assert 0 < len(taken) < len(exact)  # a triangle is left


def test_the_predicate_on_annotations():
    def item(name, area, crowd=False):
        return AnnotatedObject(name, (0, 0, 50, 50), is_crowd=crowd, area=area)

    one, two = item("cat", 1500), item("dog", 1999)
    assert chosen_object([one, two]) is one and chosen_object([two, one]) is two
    assert chosen_object([item("cat", 1000), two]) is two  # the bound itself is out
    assert chosen_object([one, item("cat", 50), two]) is two  # two cats
    assert chosen_object([one, *[item("tree", 5)] * 3]) is None  # four annotations
    assert chosen_object([item("cat", 1500, crowd=True)]) is not None  # crowd regions count
    assert chosen_object([]) is None
    assert stated_area(AnnotatedObject("x", (0, 0, 30, 50))) == 1500


def test_sets_of_a_coco_file_with_polygons_run_lengths_and_crowds(tmp_path, clip):
    """One picture per way of drawing; the reader keeps outlines and areas, the crowd region has no outline."""
    Image.new("RGB", (640, 427)).save(tmp_path / "a.png")
    square = [446.0, 340.0, 480.0, 340.0, 480.0, 357.0, 446.0, 357.0]
    mask = np.zeros((427, 640), dtype=bool)
    mask[340:357, 446:480] = True
    runs = np.diff(np.flatnonzero(np.diff(np.r_[False, mask.T.ravel(), False])))
    counts = [int(np.flatnonzero(mask.T.ravel())[0]), *map(int, runs)]
    counts.append(mask.size - sum(counts))
    compressed = pytest.importorskip("pycocotools.mask").encode(np.asfortranarray(mask.astype(np.uint8)))
    shapes = {
        "polygon": [square],
        "runs": {"size": [427, 640], "counts": counts},
        "text": {"size": [427, 640], "counts": compressed["counts"].decode()},
    }
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "person"}]}
    for number, (name, shape) in enumerate(shapes.items()):
        Image.new("RGB", (640, 427)).save(tmp_path / f"{name}.png")
        content["images"].append({"id": number, "file_name": f"{name}.png", "width": 640, "height": 427})
        row = {"image_id": number, "bbox": [446, 340, 34, 17], "area": 1578.0, "category_id": 1, "iscrowd": 0}
        content["annotations"].append({"id": number, "segmentation": shape, **row})
        crowd = {"size": [427, 640], "counts": [0, 427 * 10, 427 * 630]}
        content["annotations"].append(
            {"id": 10 + number, "segmentation": crowd, **row, "category_id": 2, "iscrowd": 1, "bbox": [0, 0, 10, 427]}
        )
    (tmp_path / "instances.json").write_text(json.dumps(content))
    images = open_annotated(f"coco:{tmp_path / 'instances.json'}:{tmp_path}", split="all")
    assert len(images) == 3
    for image in images:
        item = chosen_object(image.objects)
        assert item.name == "cup" and item.area == 1578 and not item.is_crowd
        assert bool(item.polygons) == (image.name == "polygon.png")
        assert cells_of_object(item, (640, 427), 24).tolist() == cells((20, 20), (20, 21))
        exact = object_tokens(token_geometry(clip, (640, 427)), item.mask).tolist()
        assert exact == cells(*[(row, column) for row in (19, 20) for column in (19, 20, 21)])


def test_only_one_square_grid_is_known(clip):
    assert grid_side(token_geometry(clip, (640, 427))) == 24
    register_processors()
    wide = token_geometry(load_model("tiny-qwen2-vl", device="cpu")[1], (300, 100))
    with pytest.raises(ValueError, match="one square grid"):
        grid_side(wide)


def test_the_noise_picture_hides_the_cells_and_nothing_else():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 70, 3), dtype=np.uint8)
    made = np.array(noise_picture(Image.fromarray(pixels), np.array([0, 9]), 8, np.random.default_rng(1)))
    middle = pixels[:, 11:59]
    assert made.shape == (48, 48, 3)
    changed = (made != middle).any(-1).reshape(8, 6, 8, 6).any((1, 3))
    assert np.flatnonzero(changed).tolist() == [0, 9]
    assert (made[:6, :6] == made[6:12, 6:12]).all()  # the same tile


def test_wordings_are_the_published_ones():
    image = AnnotatedImage("a", (), lambda: None)
    target = Target(image, thing(0, 0, 9, 9, "orange"), ClassWords("orange"), question="What is on the table?")
    assert query(target, "polling").question == "Is there a orange in this image?"
    assert query(target, "generative").question == "Describe this image."
    assert query(target, "vqa").answer_start == "It is a" and query(target, "vqa").max_new_tokens == 1
    with pytest.raises(ValueError, match="cannot be asked"):
        query(Target(image, target.object, target.words), "vqa")


def test_scorers_have_the_defects_that_ours_have_not():
    """D4 and D5 one by one; our scorers pass the same list (test_scorers)."""
    fallen = {(trap.name, trap.text) for trap in self_test(judge_trap)}
    for name, text in (("cat", "located"), ("bed", "described"), ("cup", "occupied"), ("tie", "parties"),
                       ("car", "carrying"), ("bus", "busy"), ("bear", "beard")):  # fmt: skip
        assert judge("generative", name, f"it is {text}") and any(trap_name == name for trap_name, _ in fallen)
    assert not judge("generative", "tv", "A TV") and judge("polling", "", "yesterday")
    assert judge("vqa", "circle", "") and judge("vqa", "circle", "c") and not judge("vqa", "circle", "ring")
    assert len(fallen) > len(TRAPS) // 3


def test_vqa_compares_with_the_first_piece_of_the_class():
    tokenizer = load_model("tiny-llava", device="cpu")[1].tokenizer
    piece = first_piece(tokenizer, "zebra")
    assert piece and "zebra".startswith(piece) and piece != "zebra"
    assert judge("vqa", "zebra", piece, tokenizer) and not judge("vqa", "zebra", "zebra", tokenizer)


def test_the_yes_token_is_the_sentence_start_where_one_is_added():
    llava, qwen = (load_model(name, device="cpu")[1].tokenizer for name in ("tiny-llava", "tiny-qwen2-vl"))
    assert yes_id(llava) == llava.bos_token_id
    assert qwen.decode([yes_id(qwen)]).strip() and "Yes".startswith(qwen.decode([yes_id(qwen)]))


def test_windows():
    published = windows(32)
    assert {name: (layers[0], layers[-1]) for name, layers in published.items()} == {
        "early": (0, 9), "early-mid": (5, 14), "mid": (11, 20), "mid-late": (15, 24), "late": (21, 31), "all": (0, 31),
    }  # fmt: skip
    assert [name for name, layers in published.items() if 10 in layers] == ["early-mid", "all"]
    for layers in (2, 5, 24, 32):
        even = even_windows(layers)
        widths = {len(window) for name, window in even.items() if name != "all"}
        assert len(widths) == 1
        assert set().union(*(w for name, w in even.items() if name != "all")) == set(range(layers))


def test_every_defect_is_accounted_for():
    assert list(DEFECTS) == [f"D{number}" for number in range(1, 20)]
    assert {defect.column for defect in DEFECTS.values()} == {"reproduced", "named", "mended"}
