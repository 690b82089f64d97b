"""Readings of object cells against plain logits and a per-pixel map; best depths and controls on planted truth."""

import json
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualstream.analysis.annotated_images import AnnotatedImage, AnnotatedObject, open_annotated
from dualstream.analysis.causality.lenses.lens_correspondence import (
    SCHEMA,
    ClassIds,
    ClassVocabulary,
    lens_rows,
    object_cells,
)
from dualstream.analysis.causality.lenses.lens_shares import (
    OBJECT,
    SETS,
    Shares,
    best_depth,
    best_depth_per_image,
    probabilities,
    shares_of,
    shares_table,
    shuffled_labels,
    summarize_shares,
    wrong_images,
)
from dualstream.cli import main
from dualstream.modeling import family_of, load_model
from dualstream.processing import build_inputs, register_processors, token_geometry

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


@pytest.fixture(scope="module")
def embedded():
    register_processors()
    return load_model("tiny-qwen2-vl", device="cpu")


def noise(name, size, boxes, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    objects = tuple(AnnotatedObject(f"word{number}", box) for number, box in boxes.items())
    return AnnotatedImage(name, objects, lambda: Image.fromarray(pixels), size)


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_are_the_models_own_logits_at_every_depth(family, tiny_model, publishing):
    """A batch of pictures of odd shapes: top-1 and log-probability of a class against all hidden states."""
    model, processor = tiny_model(family).model, publishing.make_processor(family)
    images = [
        noise("a", (97, 41), {11: (5, 5, 60, 30), 12: (70, 3, 90, 20)}, 0),
        noise("b", (40, 64), {13: (1, 1, 30, 30)}, 1),
    ]
    vocabulary = ClassVocabulary(processor.tokenizer, 200)
    assert vocabulary.ids("word11").whole == (11,)
    rows = lens_rows(model, processor, images, vocabulary, min_coverage=0.3)
    pictures = [image.image() for image in images]
    inputs = build_inputs(processor, pictures, ["Describe the image."] * 2)
    inputs.pop("compression", None)
    readers = [*family_of(model).llm_blocks(model), family_of(model).final_norm(model)]
    seen = []  # what every block and the norm get to see, Qwen3-VL's deepstack features included
    hooks = [
        reader.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for reader in readers
    ]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert [row["depth"] for row in rows[0]] == list(range(len(seen))) == list(range(len(output.hidden_states)))
    torch.testing.assert_close(seen[0], output.hidden_states[0])
    placeholder = inputs["input_ids"] == family_of(model).image_token_id(model.config)
    for number, own in enumerate(rows):
        count = int(placeholder[number].sum())
        assert own[0]["n_visual"] == count == len(token_geometry(processor, pictures[number].size))
        for row in own:
            hidden = seen[row["depth"]][number, placeholder[number]]
            logits = model.get_output_embeddings()(family_of(model).final_norm(model)(hidden))
            if row["depth"] == len(seen) - 1:
                torch.testing.assert_close(logits, output.logits[number, placeholder[number]])
            assert (logits.argmax(-1).numpy() == row["top1"]).all()
            log_p = logits.log_softmax(-1).detach()
            for name, scores in zip(row["objects"], row["log_p"], strict=True):
                expected = log_p[:, vocabulary.ids(name).whole[0]]
                np.testing.assert_allclose(scores, expected, atol=2e-3, rtol=1e-3)


def test_cells_agree_with_a_map_of_every_pixel(embedded):
    """Coverage by counting the pixels whose centre lies in a cell; none of the controls overlaps its object."""
    processor = embedded[1]
    for image in open_annotated("scenes:validation:12:96"):
        geometry = token_geometry(processor, (96, 96))
        found = object_cells(image, processor, (96, 96), 0.5)
        owner = np.array([[geometry.token_at(x + 0.5, y + 0.5) for x in range(96)] for y in range(96)])
        names = [item.name for item in image.objects]
        assert [name for name, _ in found] == names
        for item, (name, cells) in zip(image.objects, found, strict=True):
            covered = np.bincount(owner[item.mask], minlength=len(geometry)) / np.bincount(owner.ravel())
            assert cells.own.tolist() == np.flatnonzero(covered >= 0.5).tolist()
            same = np.any([other.mask for other in image.objects if other.name == name], axis=0)
            assert cells.same_name.tolist() == np.unique(owner[same]).tolist()
            assert not set(cells.moved) & set(cells.same_name)
            assert len(cells.moved) in (0, len(cells.own))


def test_crowds_are_no_objects_but_their_cells_are_no_outside_cells(embedded):
    crowd = AnnotatedObject("ring", (0, 0, 48, 48), is_crowd=True)
    image = AnnotatedImage("a", (crowd, AnnotatedObject("ring", (60, 60, 90, 90))), lambda: None, (96, 96))
    ((name, cells),) = object_cells(image, embedded[1], (96, 96), 0.5)
    assert name == "ring" and 0 in cells.same_name and 0 not in cells.own


def test_objects_of_another_area_are_left_out(embedded):
    sizes = {"small": (0, 0, 24, 24), "large": (36, 36, 96, 96)}
    image = AnnotatedImage("a", tuple(AnnotatedObject(*item) for item in sizes.items()), lambda: None, (96, 96))
    found = object_cells(image, embedded[1], (96, 96), 0.5, area=(1000, 4000))
    assert [name for name, _ in found] == ["large"] and len(found[0][1].own) == 25


def test_which_entries_read_as_a_class(embedded):
    vocabulary = ClassVocabulary(embedded[1].tokenizer, 672, {"star": ("cross",)})
    tokenizer = embedded[1].tokenizer
    read = {tokenizer.decode([i]) for i in vocabulary.ids("ring").whole}
    assert read == {"ring", " ring", " rings"}
    assert set(vocabulary.ids("cross").whole) < set(vocabulary.ids("star").whole)
    nothing = vocabulary.ids("zebra")
    assert nothing.whole == () and all(
        len(tokenizer.decode([i]).strip()) >= 3 and "zebra".startswith(tokenizer.decode([i]).strip())
        for i in nothing.piece
    )
    pieces = [tokenizer.decode([i]).strip() for i in vocabulary.ids("picturesque").piece]
    assert "picture" in pieces and not vocabulary.ids("picturesque").whole


def table_of(reads, cells, names, n_visual=8, same=None, moved=None):
    """Rows of pictures with one object each: reads (images, depths, cells)."""
    rows = []
    for number, picture in enumerate(np.asarray(reads)):
        for depth, top1 in enumerate(picture):
            rows.append(
                {
                    "image": f"{number:04d}",
                    "depth": depth,
                    "n_visual": n_visual,
                    "objects": [names[number]],
                    "cells": [cells[number]],
                    "same_name": [cells[number] if same is None else same[number]],
                    "moved": [[] if moved is None else moved[number]],
                    "top1": top1,
                    "log_p": [np.log(np.full(n_visual, 0.5))],
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


CLASSES = {"a": ClassIds((1,), (1, 3)), "b": ClassIds((2,), (2,))}


def test_shares_of_a_worked_example():
    reads = [[[1, 3, 0, 0, 1, 0, 0, 0]], [[2, 2, 0, 1, 0, 0, 0, 0]]]
    table = table_of(reads, [[0, 1], [0, 1, 3]], ["a", "b"], moved=[[2, 4], []])
    found = shares_of(table, CLASSES)
    assert found.hits[OBJECT].sum(-1).tolist() == [[1], [2]] and found.sizes[OBJECT].tolist() == [[1, 1], [2, 1]]
    assert found.hits["outside"].sum(-1).tolist() == [[1], [0]] and found.sizes["outside"].sum(-1).tolist() == [6, 5]
    assert found.hits["moved"].sum(-1).tolist() == [[1], [0]] and found.sizes["moved"].sum(-1).tolist() == [2, 0]
    assert found.hits["shuffled labels"].sum(-1).tolist() == [[0], [1]]  # only two objects: labels change places
    assert found.hits["wrong image"].sum(-1).tolist() == [[0], [0]]
    assert shares_of(table, CLASSES, "piece").hits[OBJECT].sum(-1).tolist() == [[2], [2]]
    images, shares = found.per_image("moved")
    assert images.tolist() == ["0000"] and shares.tolist() == [[0.5]]
    rows = shares_table(found).to_pylist()
    assert {"image": "0001", "class": "b", "set": OBJECT, "depth": 0, "hits": 2, "cells": 3} in rows
    assert len(rows) == 2 * len(SETS)
    with pytest.raises(ValueError, match="rule='exact'"):
        shares_of(table, CLASSES, "exact")
    with pytest.raises(ValueError, match="lower min_coverage"):
        shares_of(table_of(reads, [[], []], ["a", "b"]), CLASSES)


def shares_from(values, cells=10, rng=None):
    """Shares of `cells` cells per picture from hit rates (images, depths)."""
    rng = rng or np.random.default_rng(0)
    hits = rng.binomial(cells // 2, np.asarray(values)[:, :, None], size=(*np.shape(values), 2))
    sizes = np.full((len(hits), 2), cells // 2)
    images = np.array([f"{i:04d}" for i in range(len(hits))])
    return Shares(images, images, dict.fromkeys(SETS, hits), dict.fromkeys(SETS, sizes))


def test_maxima_are_flattered_and_cross_fitting_is_not():
    """The same rate at all depths: no depth is best. The in-sample maximum per picture is far above the rate."""
    found = shares_from(np.full((400, 30), 0.2))
    each = best_depth_per_image(found, OBJECT)
    assert each["in_sample"]["value"] > 0.4
    assert each["cross_fitted"]["low"] <= 0.2 <= each["cross_fitted"]["high"]
    _, shares = found.per_image(OBJECT)
    one = best_depth(shares, found.images)
    assert one["in_sample"]["value"] > one["cross_fitted"]["value"]
    assert one["cross_fitted"]["low"] <= 0.2 <= one["cross_fitted"]["high"]


def test_a_true_best_depth_is_found_by_every_fold():
    rates = np.full((200, 6), 0.1)
    rates[:, 4] = 0.7
    found = shares_from(rates)
    _, shares = found.per_image(OBJECT)
    one = best_depth(shares, found.images)
    assert one["depth"] == 4 and set(one["depths_chosen"]) == {4}
    assert one["cross_fitted"]["value"] == pytest.approx(one["in_sample"]["value"])
    assert best_depth_per_image(found, OBJECT)["mean_depth"] == pytest.approx(4, abs=0.2)


def test_pictures_without_any_hit_are_counted_and_do_not_move_the_mean_depth():
    hits = np.zeros((3, 4, 2), dtype=int)
    hits[0, 3] = 1
    sizes = np.ones((3, 2), dtype=int)
    images = np.array(["a", "b", "c"])
    found = Shares(images, images, dict.fromkeys(SETS, hits), dict.fromkeys(SETS, sizes))
    each = best_depth_per_image(found, OBJECT)
    assert each["mean_depth"] == 3 and each["without_hit"] == 2


def test_a_lens_that_sees_nothing_has_no_lift_and_one_that_sees_has():
    """Planted truth: cells read as the class with a chance, all other readings are noise."""
    rng = np.random.default_rng(1)
    cells = [[0, 1, 2, 3]] * 150
    names = ["a" if i % 2 else "b" for i in range(150)]
    blind = rng.integers(0, 9, (150, 2, 8))
    summary = summarize_shares(shares_of(table_of(blind, cells, names), CLASSES))
    for kind in ("outside", "shuffled labels", "wrong image"):
        assert summary[kind]["lift"]["low"] < 0 < summary[kind]["lift"]["high"]
        assert summary[kind]["lift"]["p_value"] > 0.01
    assert summary["moved"] is None
    sees = blind.copy()
    planted = rng.random((150, 2, 4)) < 0.6
    own = np.array([CLASSES[name].whole[0] for name in names])[:, None, None]
    sees[:, :, :4] = np.where(planted, own, sees[:, :, :4])
    summary = summarize_shares(shares_of(table_of(sees, cells, names), CLASSES))
    assert summary["outside"]["lift"]["low"] > 0.4 and summary["outside"]["lift"]["p_value"] < 0.001
    share = summary[OBJECT]["best_depth"]["cross_fitted"]
    assert share["low"] < 0.6 + 0.4 / 9 < share["high"]
    assert summary["cells"]["n_cells"] == 600


@given(st.lists(st.integers(0, 5), min_size=1, max_size=25))
def test_shuffled_labels_are_a_permutation(images):
    names = [f"label {i}" for i in range(len(images))]
    assert sorted(shuffled_labels(list(map(str, images)), names)) == sorted(names)


def test_shuffled_labels_come_from_other_pictures():
    images = np.repeat(np.arange(50), 3).astype(str)
    shuffled = shuffled_labels(list(images), list(images))
    assert all(label != image for label, image in zip(shuffled, images, strict=True))
    assert shuffled == shuffled_labels(list(images), list(images))
    assert shuffled != shuffled_labels(list(images), list(images), seed=1)


def test_wrong_images_have_as_many_cells():
    partner = wrong_images({"a": 4, "b": 6, "c": 4, "d": 9, "e": 4})
    assert partner == {"a": "c", "c": "e", "e": "a"}


def test_probabilities_leave_out_what_the_vocabulary_cannot_say():
    reads = np.zeros((3, 1, 8), dtype=int)
    table = table_of(reads, [[0, 1]] * 3, ["a", "b", "a"]).to_pylist()
    for number, row in enumerate(table):
        scores = np.full(8, -5.0, dtype=np.float32)
        scores[:2] = -1.0
        row["log_p"] = [scores if number < 2 else np.full(8, -np.inf)]
    (found,) = probabilities(pa.Table.from_pylist(table, schema=SCHEMA))
    assert found["object"]["value"] == -1 and found["outside"]["value"] == -5 and found["difference"]["n"] == 2


def run_lens(folder, *extra):
    return main(["analyze", "lens", "--data", "scenes:validation:10", "--out", str(folder), "--json", *extra])


def test_command_resumes_and_ends_with_the_same_files(tmp_path, capsys):
    assert run_lens(tmp_path / "whole") == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["summary"]["accounting"]["pictures"] == 10
    assert run_lens(tmp_path / "cut", "--limit", "4", "--batch-size", "3") == 0
    for path in sorted((tmp_path / "cut" / "rows").glob("*.parquet"))[:2]:
        path.unlink()  # as if killed before they were written
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "rows").glob("*.parquet")}
    time.sleep(0.01)
    assert run_lens(tmp_path / "cut") == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in untouched.items())
    for name in ("summary.json", "report.md", "lens.png", "shares.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    capsys.readouterr()
    assert run_lens(tmp_path / "cut", "--min-coverage", "0.2") == 2
    assert "another configuration" in json.loads(capsys.readouterr().out)["error"]


def test_bad_input_is_explained(tmp_path, capsys):
    Image.new("RGB", (60, 40)).save(tmp_path / "plain.png")
    for arguments, words in (
        (["--data", str(tmp_path)], "have no objects"),
        (["--min-coverage", "2"], "min_coverage must lie in 0..1"),
        (["--synonyms", str(tmp_path / "none.txt")], "synonyms='none.txt'"),
    ):
        assert run_lens(tmp_path / f"out{len(words)}", *arguments) == 2
        assert words in json.loads(capsys.readouterr().out)["error"]


def test_geometry_that_does_not_fit_is_refused(embedded, monkeypatch):
    from dualstream.analysis.causality.lenses import lens_correspondence

    monkeypatch.setattr(lens_correspondence, "token_geometry", lambda *_: [0] * 3)
    monkeypatch.setattr(lens_correspondence, "object_cells", lambda *_: [])
    images = [open_annotated("scenes:validation:1")[0]]
    with pytest.raises(ValueError, match="64 features in the model but 3 tokens"):
        lens_rows(*embedded, images, ClassVocabulary(embedded[1].tokenizer, 672))
