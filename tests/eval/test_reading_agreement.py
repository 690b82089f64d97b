"""Agreement of two readings, cell by cell, against references written with plain loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.eval.reading_agreement import reading_agreement
from dualstream.modeling import CompressionConfig, run_length_plan

VOCAB = 7


@st.composite
def maps(draw):
    """Two readings with few distinct ids, several images of several blocks, and random tables."""
    grids = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5))
    images = np.cumsum([0, *draw(st.lists(st.integers(0, 1), min_size=len(grids) - 1, max_size=len(grids) - 1))])
    cells = sum(h * w for h, w in grids)
    draws = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    student = np.argsort(draws.random((cells, VOCAB)))[:, :6]
    student[:, 0] = draws.integers(0, draw(st.integers(1, 4)), cells)  # few best readings, so that runs occur
    teacher = draws.integers(0, draw(st.integers(1, 4)), (cells, 2))
    meaningless = draws.random(VOCAB) < 0.4
    key = draws.integers(0, VOCAB, VOCAB) if draw(st.booleans()) else None
    return grids, images, student, teacher, meaningless, key


def f1(found: list[bool], wanted: list[bool]) -> float:
    if not any(found) and not any(wanted):
        return 1.0
    hits = sum(a and b for a, b in zip(found, wanted, strict=True))
    if hits == 0:
        return 0.0
    precision, recall = hits / sum(found), hits / sum(wanted)
    return 2 * precision * recall / (precision + recall)


def kept_tokens(rows: list[np.ndarray], method: str, meaningless, key) -> int:
    """Runs of one block that stay, by a loop; at least one per block."""
    kept = 0
    for row in rows:
        start = 0
        for column in range(1, len(row) + 1):
            if column < len(row) and key[row[column][0]] == key[row[start][0]]:
                continue
            run, readings = row[start:column], 2 if method == "rle_drop_top2" else 1
            dropped = method != "rle" and all(meaningless[i] for cell in run for i in cell[:readings])
            kept += not dropped
            start = column
    return max(kept, 1)


def reference(grids, images, student, teacher, meaningless, key):
    """Every figure of every image, from first principles."""
    key = np.arange(VOCAB) if key is None else key
    found = {}
    for image in sorted(set(images.tolist())):
        flags, changes, hits, hits5, kept, cells, first = ([], []), ([], []), [], [], {}, 0, 0
        for block, (height, width) in enumerate(grids):
            span = range(first, first + height * width)
            first += height * width
            if images[block] != image:
                continue
            cells += height * width
            for cell in span:
                hits.append(key[student[cell, 0]] == key[teacher[cell, 0]])
                hits5.append(key[teacher[cell, 0]] in [key[i] for i in student[cell, :5]])
            for which, ids in enumerate((student, teacher)):
                rows = [ids[span[0] + row * width : span[0] + (row + 1) * width] for row in range(height)]
                flags[which].extend(bool(meaningless[cell[0]]) for row in rows for cell in row)
                changes[which].extend(key[a[0]] != key[b[0]] for row in rows for a, b in pairwise(row))
                for method in ("rle", "rle_drop_top1", "rle_drop_top2"):
                    kept[method, which] = kept.get((method, which), 0) + kept_tokens(rows, method, meaningless, key)
        values = {
            "top1": np.mean(hits),
            "top5": np.mean(hits5),
            "boundary_f1": f1(*changes),
            "meaningless_f1": f1(*flags),
            "kept_ratio_difference": (kept["rle", 0] - kept["rle", 1]) / cells,
            "kept_ratio_difference_drop_top1": (kept["rle_drop_top1", 0] - kept["rle_drop_top1", 1]) / cells,
            "kept_ratio_difference_drop_top2": (kept["rle_drop_top2", 0] - kept["rle_drop_top2", 1]) / cells,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def tensors(grids, images, student, teacher, meaningless, key):
    options = {"image_index": torch.tensor(images), "meaningless": torch.tensor(meaningless)}
    options["key"] = None if key is None else torch.tensor(key)
    return (torch.tensor(student), torch.tensor(teacher), torch.tensor(grids)), options


@settings(max_examples=150, deadline=None)
@given(maps())
def test_every_figure_equals_its_reference(given_maps):
    arguments, options = tensors(*given_maps)
    found, expected = reading_agreement(*arguments, **options), reference(*given_maps)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


@settings(max_examples=50, deadline=None)
@given(maps())
def test_a_perfect_student_agrees_in_everything(given_maps):
    (_, teacher, grids), options = tensors(*given_maps)
    student = torch.cat([teacher, teacher.new_zeros(len(teacher), 3)], dim=1)
    for name, values in reading_agreement(student, teacher, grids, **options).items():
        assert (values == (0 if "difference" in name else 1)).all(), name


@settings(max_examples=50, deadline=None)
@given(maps())
def test_f1_is_symmetric_and_differences_change_sign(given_maps):
    (student, teacher, grids), options = tensors(*given_maps)
    forward = reading_agreement(student[:, :2], teacher, grids, **options)
    backward = reading_agreement(teacher, student[:, :2], grids, **options)
    for name, values in forward.items():
        assert values == pytest.approx(-backward[name] if "difference" in name else backward[name]), name


@settings(max_examples=50, deadline=None)
@given(maps())
def test_images_do_not_influence_each_other(given_maps):
    grids, images, student, teacher, meaningless, key = given_maps
    whole = reading_agreement(*(given := tensors(*given_maps))[0], **given[1])
    sizes = np.array([h * w for h, w in grids])
    of_cell = np.repeat(images, sizes)
    for number, image in enumerate(sorted(set(images.tolist()))):
        own = [grid for grid, i in zip(grids, images, strict=True) if i == image]
        cells = of_cell == image
        arguments, options = tensors(own, np.zeros(len(own), int), student[cells], teacher[cells], meaningless, key)
        for name, values in reading_agreement(*arguments, **options).items():
            assert values[0] == pytest.approx(whole[name][number])


def test_the_worked_example_of_the_specification():
    """spec 16.2: 2 rows of 4, "sky sky , dog" and "dog dog , ."; runs within rows."""
    sky, comma, dog, stop = range(4)
    teacher = torch.tensor([sky, sky, comma, dog, dog, dog, comma, stop])
    student = torch.tensor([sky, sky, sky, dog, dog, comma, comma, stop])[:, None]
    meaningless = torch.tensor([False, True, False, True])
    figures = reading_agreement(student, teacher, torch.tensor([[2, 4]]), meaningless=meaningless)
    assert figures["top1"] == [6 / 8]
    # teacher changes before columns 2, 3 | 2, 3; student before 3 | 1, 3: two in common
    assert figures["boundary_f1"] == pytest.approx([2 * 2 / (4 + 3)])
    assert figures["meaningless_f1"] == pytest.approx([2 * 2 / (3 + 3)])
    assert figures["kept_ratio_difference"] == [(5 - 6) / 8]
    assert figures["kept_ratio_difference_drop_top1"] == [(3 - 3) / 8]
    assert "top5" not in figures and "kept_ratio_difference_drop_top2" not in figures


def test_uniform_maps_have_perfect_boundaries_and_one_boundary_against_none_has_zero():
    grids = torch.tensor([[1, 3]])
    same, other = torch.zeros(3, 1, dtype=torch.long), torch.tensor([[0], [0], [1]])
    assert reading_agreement(same, same + 1, grids)["boundary_f1"] == [1]
    assert reading_agreement(same, other, grids)["boundary_f1"] == [0]
    assert reading_agreement(other, same, grids)["boundary_f1"] == [0]


def test_the_kept_ratio_is_that_of_the_default_compression():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(0, 3, (2, 24, 2), generator=generator)
    grids, meaningless = torch.tensor([[4, 6]]), torch.tensor([True, False, False])
    figures = reading_agreement(student, teacher, grids, meaningless=meaningless)
    for name, method in (("kept_ratio_difference", "rle"), ("kept_ratio_difference_drop_top2", "rle_drop_top2")):
        kept = [
            run_length_plan(ids, grids, CompressionConfig(method), meaningless).num_kept for ids in (student, teacher)
        ]
        assert figures[name] == (kept[0] - kept[1]) / 24


def test_bad_input_is_refused():
    ids, grids = torch.zeros(4, 1, dtype=torch.long), torch.tensor([[2, 2]])
    with pytest.raises(ValueError, match=r"student_ids must have shape .*got \(3, 1\); the grids have 4 cells"):
        reading_agreement(ids[:3], ids, grids)
    with pytest.raises(ValueError, match=r"teacher_ids must have shape .*got \(4, 0\)"):
        reading_agreement(ids, ids[:, :0], grids)
    with pytest.raises(ValueError, match=r"student_ids holds ids outside 0\.\.1, the entries of meaningless"):
        reading_agreement(ids + 2, ids, grids, meaningless=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="image_index must be ascending"):
        reading_agreement(ids, ids, torch.tensor([[1, 2], [1, 2]]), image_index=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="image 1 has no cells"):
        reading_agreement(ids, ids, torch.tensor([[2, 2], [0, 3]]))
