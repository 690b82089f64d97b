"""Scenes: determinism, exact geometry, sound answers, parquet shards."""

import itertools
import json
import random
import re

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.data_builders.scenes import (
    COLORS,
    KINDS,
    SHAPES,
    SPLIT_SEEDS,
    ask,
    build_scenes,
    make_scene,
    questions,
    rasterize,
    render,
    stream_scenes,
    write_scenes,
)
from dualstream.data_builders.scenes.build import decode_mask, encode_mask
from dualstream.data_builders.scenes.questions import noun_phrases

SEEDS = st.integers(0, 10**9 - 1)
FAST = settings(max_examples=30, deadline=None)


def test_same_seed_same_picture_and_questions():
    for seed in (0, 7, 123_456_789):
        assert make_scene(seed) == make_scene(seed)
        assert render(make_scene(seed)).tobytes() == render(make_scene(seed)).tobytes()
        assert questions(make_scene(seed), random.Random(1)) == questions(make_scene(seed), random.Random(1))
    assert make_scene(1) != make_scene(2)


@FAST
@given(SEEDS, st.sampled_from([32, 96, 97, 224]), st.sampled_from([1.0, 0.6, 1.7, 4.0]))
def test_boxes_are_the_extents_of_the_masks(seed, size, aspect):
    raster = rasterize(make_scene(seed, aspect), size)
    height, width, _ = raster.image.shape
    assert min(height, width) == size
    for mask, (left, top, right, bottom) in zip(raster.masks, raster.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert raster.masks.sum(0).max() <= 1


@FAST
@given(SEEDS)
def test_masks_show_their_objects_colour(seed):
    """Away from edges a solid object's pixels are its colour, and pixels outside all masks and clutter are not."""
    scene = make_scene(seed)
    raster = rasterize(scene, 192)
    for item, mask in zip(scene.objects, raster.masks, strict=True):
        inner = mask.copy()
        for shift in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            inner &= np.roll(mask, shift, (0, 1))
        if item.texture == "solid" and inner.any():
            assert np.abs(raster.image[inner].astype(int) - COLORS[item.color]).max() <= 1


def test_masks_scale_with_the_size():
    scene = make_scene(5)
    small, large = (rasterize(scene, size).masks.mean((1, 2)) for size in (96, 480))
    np.testing.assert_allclose(small, large, rtol=0.12)


@FAST
@given(SEEDS, st.integers(1, 6))
def test_objects_do_not_touch(seed, count):
    objects = make_scene(seed, n_objects=count).objects
    assert len(objects) == count
    for i, a in enumerate(objects):
        for b in objects[:i]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_scene(0, aspect=9.0), "aspect is 9.0"),
        (lambda: make_scene(0, n_objects=7), "n_objects is 7"),
        (lambda: rasterize(make_scene(0), 4), "size is 4"),
        (lambda: ask(make_scene(0), "riddle", random.Random(0)), "kind is 'riddle'"),
        (lambda: build_scenes("dev", 1), "split is 'dev'"),
        (lambda: build_scenes("test", 10**9), "1000000000"),
        (lambda: decode_mask([3, 2], 2, 2), "add up to 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_splits_are_disjoint():
    ranges = sorted((r.start, r.stop) for r in SPLIT_SEEDS.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def solve(scene, question):
    """Answer a question from the scene's objects by an independent reading of its text."""
    text = question.text.lower().rstrip("?.")

    def fitting(phrase):
        words = set(re.sub(r"(cross)es|(\w+?)s\b", lambda m: m[1] or m[2], phrase).split()) if phrase else set()
        words = {"cross" if word == "cros" else word for word in words}
        colors, shapes = words & set(COLORS), words & set(SHAPES)
        return [o for o in scene.objects if (not colors or o.color in colors) and (not shapes or o.shape in shapes)]

    if question.kind == "presence":
        return "yes" if fitting(re.search(r"\ban? (.+?)( in the .+)?$", text)[1]) else "no"
    if question.kind == "count":
        return str(len(fitting(re.search(r"(?:how many|count the) (.+?)( are there| do you see)?$", text)[1])))
    if question.kind in ("relation", "direction"):
        names = re.findall(r"the ((?:\w+ )?(?:" + "|".join(SHAPES) + "|object))", text)
        (a,), (b,) = fitting(names[0]), fitting(names[1])
        if question.kind == "direction":
            if "above" in text:
                return "above" if a.y < b.y else "below"
            return "left" if a.x < b.x else "right"
        signs = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        signs |= {"higher": signs["above"], "lower": signs["below"]}
        (word,) = set(re.findall("|".join(signs), text)) & set(signs)
        if question.form == "yes_no":
            return "yes" if signs[word] > 0 else "no"
        return names[0] if signs[word] > 0 else names[1]
    return None


@pytest.mark.parametrize("kind", ["presence", "count", "relation", "direction"])
def test_answers_follow_from_the_objects(kind):
    checked = 0
    for seed in range(400):
        scene = make_scene(seed)
        question = ask(scene, kind, random.Random(seed))
        if question:
            assert solve(scene, question) == question.answer, question
            checked += 1
    assert checked > 200


def test_attribute_and_where_answers_are_the_objects_own():
    for seed in range(300):
        scene = make_scene(seed)
        for kind in ("attribute", "where"):
            question = ask(scene, kind, random.Random(seed))
            if not question:
                continue
            (index,) = question.objects
            item = scene.objects[index]
            if question.form in ("color", "shape", "texture"):
                assert question.answer == getattr(item, question.form)
            elif question.form == "yes_no":
                assert (question.answer == "yes") == (item.color in question.text)
            elif question.form == "half":
                axis = item.x if question.answer in ("left", "right") else item.y
                assert (axis > 0.5) == (question.answer in ("right", "bottom"))
            else:
                row, column = question.answer.split()
                assert {"top": 0, "middle": 1, "bottom": 2}[row] == int(3 * item.y)
                assert {"left": 0, "center": 1, "right": 2}[column] == int(3 * item.x)


def test_noun_phrases_name_one_object_only():
    for seed in range(200):
        scene = make_scene(seed)
        named = [phrase for phrases in noun_phrases(scene).values() for phrase in phrases]
        assert len(named) == len(set(named))


def test_every_kind_is_asked():
    seen = {q.kind for seed in range(40) for q in questions(make_scene(seed), random.Random(seed))}
    assert seen == set(KINDS)


@FAST
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_mask_run_lengths_round_trip(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    runs = encode_mask(mask)
    assert sum(runs) == mask.size
    np.testing.assert_array_equal(decode_mask(runs, width, height), mask)


def test_parquet_round_trip_resume_and_streaming(tmp_path):
    entry = write_scenes(tmp_path, "test", 25, shard_rows=10)
    files = sorted((tmp_path / "data").glob("*.parquet"))
    assert [f.name for f in files] == list(entry["shards"])
    assert not list(tmp_path.rglob("*.partial"))
    stamps = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    assert write_scenes(tmp_path, "test", 25, shard_rows=10) == entry
    after = [f.stat().st_mtime_ns for f in files]
    assert (after[0], after[2]) == (stamps[0], stamps[2])
    assert json.loads((tmp_path / "manifest.json").read_text())["test"] == entry

    loaded = datasets.Dataset.from_parquet([str(f) for f in files], cache_dir=str(tmp_path / "cache"))
    built = build_scenes("test", 25)
    assert loaded.features == built.features
    streamed = datasets.load_dataset(
        "parquet", data_files={"test": [str(f) for f in files]}, split="test", streaming=True
    )
    for a, b, c, raw in zip(loaded, built, streamed, stream_scenes("test", 25), strict=True):
        assert a["image"].tobytes() == b["image"].tobytes() == c["image"].tobytes()
        assert a["objects"] == b["objects"] == c["objects"]
        assert [q["answer"] for q in a["questions"]] == [q["answer"] for q in raw["questions"]]
        raster = rasterize(make_scene(a["seed"]))
        for item, mask, box in zip(a["objects"], raster.masks, raster.boxes, strict=True):
            np.testing.assert_array_equal(decode_mask(item["mask"], a["width"], a["height"]), mask)
            assert item["box"] == box.tolist()


def test_settings_change_rebuilds_the_split(tmp_path):
    first = write_scenes(tmp_path, "validation", 4, size=32)
    second = write_scenes(tmp_path, "validation", 4, size=48)
    assert first["shards"] != second["shards"]
