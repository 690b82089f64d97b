"""Pairs from scenes and from boxes of photographs, and the visual tokens of their objects in every family."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject
from dualstream.analysis.where.bench import Bench
from dualstream.analysis.where.items import (
    ROLES,
    Question,
    WhereItem,
    draw_stand_in,
    open_pairs,
    scene_pair,
    stand_in_color,
)
from dualstream.analysis.where.vision_states import patch_layout
from dualstream.processing.patch_order import inverse, merge_block_order

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
SIGNS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1), "behind": (1, -1), "front": (1, 1)}


def centre(thing):
    return ((thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2)


def assert_relations_hold(pair):
    for item in pair.items:
        axis, sign = SIGNS[item.relation]
        apart = [a - b for a, b in zip(*(centre(item.object(role)) for role in ROLES), strict=True)]
        assert np.sign(apart[axis]) == sign and abs(apart[axis]) > abs(apart[1 - axis])
        assert item.spatial.options[item.spatial.answer] == item.relation
        assert set(item.spatial.options) == set(pair.relations)


@pytest.mark.parametrize("seed", [1_100_000_000, 1_100_000_001, 7])
def test_scene_pairs(seed):
    pair = scene_pair(seed)
    assert pair.relations == ("left", "right", "above", "below")
    assert_relations_hold(pair)
    assert sorted(item.presence.answer for item in pair.items) == [0, 0, 1, 1]
    for item in pair.items:
        there = {f"{thing.color} {thing.shape}" for thing in item.picture.scene.objects}
        asked = item.presence.text.removeprefix("Is there a ").removeprefix("Is there an ")
        assert (asked.removesuffix(" in the picture?") in there) == (item.presence.answer == 0)
        assert set(item.kinds) == there
    first, second = (item.object(item.anchor).box for item in pair.items[:2])
    assert first == second  # one object of an axis stands still


def test_scenes_come_from_the_right_splits():
    source = open_pairs("scenes", 8)
    again = open_pairs("scenes", 8)
    assert [pair.pair_id for pair in source.pairs] == [pair.pair_id for pair in again.pairs]
    assert len(source.pairs) == 8 and len(source.calibration) == 4
    assert not {pair.pair_id for pair in source.pairs} & {pair.pair_id for pair in source.calibration}
    assert {pair.pair_id for pair in open_pairs("scenes", 8, seed=1).pairs}.isdisjoint(
        pair.pair_id for pair in source.pairs
    )
    with pytest.raises(ValueError, match=r"scenes and whatsup_b:FOLDER"):
        open_pairs("coco", 8)
    with pytest.raises(ValueError, match="at least 2"):
        open_pairs("scenes", 1)


@pytest.fixture
def photographs(tmp_path):
    """Boxes of eight complete pairs and one without its picture `behind`; no pictures."""
    boxes = {
        "left_of": [[100, 400, 300, 600], [900, 420, 1100, 640]],
        "right_of": [[900, 400, 1100, 600], [100, 420, 300, 640]],
        "behind": [[500, 200, 640, 300], [480, 600, 700, 900]],
        "in-front_of": [[480, 600, 700, 900], [500, 200, 640, 300]],
    }
    names = [("mug", "knife"), ("mug", "tape"), ("plate", "fork"), ("book", "candle"), ("cap", "remote")]
    names += [("cup", "phone"), ("can", "spoon"), ("bowl", "scissors"), ("remote", "mug")]
    lines = []
    for a, b in names:
        for number, (relation, (first, second)) in enumerate(boxes.items()):
            if (a, relation) != ("remote", "behind"):
                own = {a: first, b: second} if number % 2 else {b: second, a: first}  # either order in the file
                lines.append(json.dumps({"image": f"{a}_{relation}_{b}", "bbox": own}))
    (tmp_path / "bbox.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return tmp_path


def test_boxes_of_photographs_become_pairs(photographs, monkeypatch):
    monkeypatch.setenv("DUALSTREAM_STAND_IN_IMAGES", "1")
    source = open_pairs(f"whatsup_b:{photographs}", 100)
    assert source.stand_in and len(source.pairs) == 4 and len(source.calibration) == 4
    assert source.skipped == ("remote, mug: behind is missing",)
    for pair in source.pairs + source.calibration:
        assert pair.relations == ("left", "right", "behind", "front")
        assert_relations_hold(pair)
        assert all(
            item.object(role).name == kind for item in pair.items for role, kind in zip(ROLES, item.kinds, strict=True)
        )
        assert sorted(item.presence.answer for item in pair.items) == [0, 0, 1, 1]
    item = source.pairs[0].items[0]
    image = item.image()
    assert image.size == (1280, 960)
    for role in ROLES:
        assert image.getpixel(tuple(map(int, centre(item.object(role))))) == stand_in_color(item.object(role).name)


def test_photographs_that_are_missing_are_named(photographs):
    source = open_pairs(f"whatsup_b:{photographs}", 4)
    with pytest.raises(ValueError, match=r"\.jpe?g.*not in the image folder"):
        source.pairs[0].items[0].image()
    Image.new("RGB", (1280, 960)).save(photographs / f"{source.pairs[0].items[0].name}.jpeg")
    assert source.pairs[0].items[0].image().size == (1280, 960)
    with pytest.raises(ValueError, match=r"bbox\.jsonl"):
        open_pairs(f"whatsup_b:{photographs / 'nowhere'}", 4)


def rectangles(size, red, blue):
    """A grey picture with a red subject and a blue reference."""
    things = (AnnotatedObject("red", tuple(map(float, red))), AnnotatedObject("blue", tuple(map(float, blue))))

    def draw():
        image = Image.new("RGB", size, (127, 127, 127))
        pen = ImageDraw.Draw(image)
        for (x1, y1, x2, y2), color in ((red, (255, 0, 0)), (blue, (0, 0, 255))):
            pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
        return image

    question = Question("?", ("yes", "no"), 0)
    picture = AnnotatedImage("rectangles", things, draw, size)
    return WhereItem("rectangles", "pair", "left", "horizontal", "", picture, ("red", "blue"), question, question)


@pytest.mark.parametrize(
    ("size", "red", "blue"),
    [
        ((96, 96), (9, 30, 41, 70), (60, 5, 95, 33)),
        ((150, 100), (30, 20, 74, 61), (80, 40, 120, 95)),
        ((70, 130), (3, 40, 40, 66), (20, 70, 66, 110)),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_coloured_rectangles(tiny_model, publishing, family, size, red, blue):
    """Mean colour of the very pixels that the tower's patches of a token hold, against the tokens of the boxes."""
    model, _ = tiny_model(family)
    item, bench = rectangles(size, red, blue), Bench(model, publishing.make_processor(family), None)
    inputs = bench.inputs([item])
    layout, pixels = patch_layout(model, inputs), inputs["pixel_values"]
    if pixels.ndim == 4:  # tiles or pictures: cut them into patches
        patch = pixels.shape[-1] // layout.grids[0][1]
        blocks, colors = pixels.shape[:2]
        cut = pixels.view(blocks, colors, pixels.shape[2] // patch, patch, -1, patch).mean((3, 5))
        colors_of_patches = cut.permute(0, 2, 3, 1).reshape(-1, 3)
    else:
        channels = pixels.view(len(pixels), 3, -1).mean(-1)  # the processors of all Qwen models emit merge blocks
        colors_of_patches = channels[inverse(merge_block_order(*layout.grids[0]))]
    seen = layout.per_token(colors_of_patches).double()
    processor = bench.processor.image_processor
    mean, spread = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    seen = seen * spread + mean
    redness, blueness = ((seen[:, i] - seen[:, j]).numpy() for i, j in ((0, 2), (2, 0)))
    for role, share in (("subject", redness), ("reference", blueness)):
        tokens = set(bench.tokens(item, role).tolist())
        sure, possible = set(np.flatnonzero(share > 0.65).tolist()), set(np.flatnonzero(share > 0.35).tolist())
        assert tokens
        if sure:  # else the object covers no token by half, and its best token stands for it
            assert sure <= tokens <= possible
        else:
            assert all(share[token] > 0.6 * share.max() for token in tokens)


def test_an_object_that_no_token_sees_is_an_error(tiny_model, publishing):
    model, _ = tiny_model("llava")
    item = rectangles((200, 64), (0, 10, 20, 30), (90, 10, 110, 30))  # the crop of the middle loses the first one
    bench = Bench(model, publishing.make_processor("llava"), None)
    assert len(bench.tokens(item, "reference"))
    with pytest.raises(ValueError, match="no visual token of 'rectangles' sees the subject"):
        bench.tokens(item, "subject")
    with pytest.raises(ValueError, match="subject, reference"):
        item.object("A")


def test_stand_ins_are_drawn_at_the_boxes():
    picture = rectangles((60, 40), (5, 5, 20, 20), (30, 10, 50, 30)).picture
    image = draw_stand_in(picture)
    assert image.getpixel((5, 5)) == image.getpixel((19, 19)) == stand_in_color("red")
    assert image.getpixel((20, 20)) == (128, 128, 128)
