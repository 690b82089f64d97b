"""Scenes: determinism, exact geometry, sound answers, parquet shards."""

import itertools
import json
import random
import re

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream import cli
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


def build(out, *options):
    return cli.main(["build", "scenes", "--out", str(out), "--train", "0", *options])


def test_a_dataset_folder_is_loaded_streamed_and_gone_on_with(tmp_path, capsys):
    out, sizes = tmp_path / "scenes", ("--validation", "0", "--test", "25", "--shard-rows", "10")
    assert build(out, *sizes, "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["rows"] == {"default": {"train": 0, "validation": 0, "test": 25}}
    files = sorted(out.rglob("*.parquet"))
    assert len(files) == 3 and not list(out.rglob("*.partial"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    files[1].unlink()
    assert build(out, *sizes) == 0
    assert [path.read_bytes() for path in files] == [content for content, _ in before.values()]
    assert [path.stat().st_mtime_ns == before[path][1] for path in files] == [True, False, True]

    loaded = datasets.load_dataset(str(out), split="test", cache_dir=str(tmp_path / "cache"))
    streamed = datasets.load_dataset(str(out), split="test", streaming=True)
    built = build_scenes("test", 25)
    assert loaded.features == built.features
    for a, b, c, raw in zip(loaded, built, streamed, stream_scenes("test", 25), strict=True):
        assert a["image"].tobytes() == b["image"].tobytes() == c["image"].tobytes()
        assert a["objects"] == b["objects"] == c["objects"]
        assert [q["answer"] for q in a["questions"]] == [q["answer"] for q in raw["questions"]]
        raster = rasterize(make_scene(a["seed"]))
        for item, mask, box in zip(a["objects"], raster.masks, raster.boxes, strict=True):
            np.testing.assert_array_equal(decode_mask(item["mask"], a["width"], a["height"]), mask)
            assert item["box"] == box.tolist()


def test_the_card_says_what_the_rows_are(tmp_path):
    assert build(tmp_path / "scenes", "--validation", "6", "--test", "4", "--size", "32") == 0
    text = (tmp_path / "scenes" / "README.md").read_text()
    header = DatasetCard(text).data.to_dict()
    assert header["configs"][0]["data_files"] == [
        {"split": "validation", "path": "default/validation-*"},
        {"split": "test", "path": "default/test-*"},
    ]
    assert "| `default` | validation | 6 |" in text and str(tmp_path) not in text
    asked = sum(
        len(row["questions"]) for split, n in (("validation", 6), ("test", 4)) for row in stream_scenes(split, n)
    )
    assert sum(int(count) for count in re.findall(r"^\| \w+ \| (\d+) \|$", text, re.MULTILINE)) == asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--validation", "0", "--test", "0"), "at least one"),
        (("--validation", "0", "--test", "-1"), "--test is -1"),
        (("--validation", "0", "--test", "1", "--size", "0"), "--size is 0"),
        (("--validation", "0", "--test", "100000001"), "which has 100000000"),
    ],
)
def test_sizes_that_make_no_dataset_are_refused(tmp_path, capsys, options, words):
    assert build(tmp_path / "scenes", *options) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "scenes").exists()


def test_other_settings_need_another_folder(tmp_path, capsys):
    assert build(tmp_path / "scenes", "--validation", "4", "--test", "0", "--size", "32") == 0
    assert build(tmp_path / "scenes", "--validation", "4", "--test", "0", "--size", "48") == 2
    assert "size: 32 there, 48 asked for" in capsys.readouterr().err
