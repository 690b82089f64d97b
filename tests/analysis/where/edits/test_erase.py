"""Objects erased: only they change, by what they were to be filled with, and the control is of the same size."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualstream.analysis.where.bench import Bench
from dualstream.analysis.where.edits import erase
from dualstream.analysis.where.edits.erase import Erase, erasures_of
from dualstream.analysis.where.edits.erase_effects import change_table, findings
from dualstream.analysis.where.edits.erased_pictures import FILLINGS, covered, filled, free_box, painted, pixels_of
from dualstream.analysis.where.items import open_pairs
from dualstream.analysis.where.object_sets import touched_tokens
from dualstream.modeling import load_model

BOXES = [(4.0, 5.0, 12.5, 14.0), (20.0, 18.0, 28.0, 30.0)]


@pytest.fixture(scope="module")
def bench():
    model, processor = load_model("tiny-llava", device="cpu")
    return Bench(model, processor, open_pairs("scenes", 2), batch_size=8, name="tiny-llava")


def two_panes():
    """A picture with a background of four greys and two red panes."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.choice([60, 80, 100, 120], (32, 40))[..., None], 3, axis=2).astype(np.uint8)
    pixels[covered(BOXES, (40, 32))] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("filling", FILLINGS)
def test_painting_changes_the_boxes_only_and_fills_with_background(filling):
    image, rng = two_panes(), np.random.default_rng(1)
    blue = np.zeros((32, 40, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    blue[covered([BOXES[0]], (40, 32))] = (0, 255, 0)
    other = (Image.fromarray(blue), [BOXES[0]])
    before = np.asarray(image)
    new = np.asarray(painted(image, BOXES[:1], BOXES, filling, other, rng))
    inside = covered(BOXES[:1], (40, 32))
    assert (new[~inside] == before[~inside]).all()
    background = before[~covered(BOXES, (40, 32))]
    if filling == "mean":
        assert (new[inside] == background.mean(0).round()).all()
    elif filling == "resample":
        assert set(map(tuple, new[inside])) <= set(map(tuple, background))
        assert len(set(map(tuple, new[inside]))) == 4
    else:
        assert (new[inside] == (0, 0, 200)).all()  # never the other picture's object


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 12), height=st.integers(1, 12))
def test_a_free_box_has_the_size_and_stays_off_where_there_is_room(seed, width, height):
    taken = covered(BOXES, (40, 32))
    left, top, right, bottom = pixels_of(
        free_box((1.0, 1.0, 1.0 + width, 1.0 + height), taken, np.random.default_rng(seed))
    )
    assert (right - left, bottom - top) == (width, height)
    assert left >= 0 and right <= 40 and top >= 0 and bottom <= 32
    if width <= 8 and height <= 8:
        assert not taken[top:bottom, left:right].any()


def test_a_free_box_without_room_touches_as_little_as_it_finds():
    taken = np.ones((10, 10), bool)
    taken[:, 8:] = False
    left, _, right, _ = pixels_of(free_box((0.0, 0.0, 4.0, 10.0), taken, np.random.default_rng(0)))
    assert (left, right) == (6, 10)


@pytest.mark.parametrize("filling", FILLINGS)
def test_filling_changes_the_tokens_only(filling):
    states, bank, rng = torch.randn(9, 4), torch.randn(7, 4), np.random.default_rng(0)
    tokens, background = np.array([1, 5]), np.array([0, 3, 8])
    new = filled(states, tokens, background, filling, bank, rng)
    kept = [0, 2, 3, 4, 6, 7, 8]
    assert torch.equal(new[kept], states[kept])
    for row in new[tokens]:
        if filling == "mean":
            assert torch.allclose(row, states[background].mean(0))
        else:
            source = states[background] if filling == "resample" else bank
            assert bool((source == row).all(-1).any())


def test_unknown_fillings_are_refused():
    with pytest.raises(ValueError, match="mean, resample, other"):
        filled(torch.zeros(2, 2), np.array([0]), np.array([1]), "noise", torch.zeros(1, 2), np.random.default_rng(0))
    with pytest.raises(ValueError, match="mean, resample, other"):
        painted(two_panes(), BOXES, BOXES, "noise", (two_panes(), BOXES), np.random.default_rng(0))


def test_nothing_of_an_object_is_left_outside_its_tokens(bench):
    for item in bench.items:
        geometry, own = bench.geometry(bench.size(item)), touched_tokens(bench, item)
        for role, tokens in own.items():
            rest = np.setdiff1d(np.arange(len(geometry)), tokens)
            assert geometry.coverage_of_mask(item.object(role).mask)[rest].max() == 0


def made_up(objects, elsewhere, level="C"):
    rows = []
    for number in range(24):
        common = {"pair_id": f"p{number}", "item": f"i{number}", "axis": "horizontal"}
        for what, filling, share in (
            ("none", "", 1.0),
            *((name, f, share) for name, share in (("objects", objects), ("elsewhere", elsewhere)) for f in FILLINGS),
        ):
            right = float(number < share * 24)
            place = "" if what == "none" else level
            row = {"level": place, "order": 0 if place else -1, "what": what, "filling": filling, "correct": right}
            rows.append(common | row | {"margin": right, "probability": right})
    return pd.DataFrame(rows)


def test_verdicts_follow_the_rule():
    (lost,) = findings(made_up(0.5, 1.0))
    assert lost.verdict == "yes" and lost.estimate.value == -50 and lost.control.value == 0
    (same,) = findings(made_up(0.5, 0.5))
    assert same.verdict == "no" and same.estimate.value == same.control.value == -50
    assert len(change_table(made_up(0.5, 1.0)).rows) == 7


def test_the_experiment_resumes_to_the_same_rows(bench, tmp_path, monkeypatch):
    from dualstream.analysis.resumable_rows import ResumableRows

    every = erasures_of(bench)
    few = [each for each in every if each.level in ("", "P", "C") and each.filling in ("", "resample", "other")]
    monkeypatch.setattr(erase, "erasures_of", lambda _: few)
    experiment, rows = Erase(), ResumableRows(tmp_path / "rows", bench.settings())
    experiment.run(bench, rows)
    table = rows.table()
    assert table.num_rows == 8 * len(few)
    rows.path("P-objects-other").unlink()
    rows.path("C-elsewhere-resample").unlink()
    experiment.run(bench, rows)
    assert rows.table().equals(table)
    assert [found.verdict in ("yes", "no", "open") for found in experiment.summarize(table)] == [True, True]
    assert experiment.tables(table)[0].rows
    assert experiment.figures(table, tmp_path)[0].stat().st_size > 8_000
