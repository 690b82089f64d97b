"""Shortened prompts against a row-by-row loop, for both layouts and any padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.modeling.prompt_plan import LAYOUTS, plan_prompt, shifted_index

IMAGE, PAD = 99, 0


@st.composite
def batches(draw):
    rows = draw(st.lists(st.lists(st.sampled_from([IMAGE, 5, 6, 7]), min_size=1, max_size=8), min_size=1, max_size=4))
    longest = max(map(len, rows)) + draw(st.integers(0, 2))
    ids, mask = [], []
    for row in rows:
        left = draw(st.integers(0, longest - len(row)))
        right = longest - len(row) - left
        ids.append([PAD] * left + row + [PAD] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    cells = sum(row.count(IMAGE) for row in rows)
    keep = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    return ids, mask, keep


def shorten_by_loop(ids, mask, keep, layout):
    """Return per row the original columns that stay; padding on the right belongs to them in the suffix layout."""
    feature = iter(keep)
    rows = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        columns, begun = [], False
        for column, (token, attended) in enumerate(zip(row_ids, row_mask, strict=True)):
            begun |= attended == 1
            if token == IMAGE:
                if next(feature):
                    columns.append(column)
            elif attended or (layout == "suffix" and begun):
                columns.append(column)
        rows.append(columns)
    return rows


@settings(max_examples=300, deadline=None)
@given(batches(), st.sampled_from(LAYOUTS))
def test_plan_equals_a_loop(batch, layout):
    ids, mask, keep = batch
    anchor = torch.tensor([index for index, kept in enumerate(keep) if kept], dtype=torch.long)
    id_tensor, mask_tensor = torch.tensor(ids), torch.tensor(mask)
    plan = plan_prompt(id_tensor, mask_tensor, IMAGE, anchor, len(keep), layout)
    if all(keep):
        assert plan.length == len(ids[0])
        if layout == "suffix":
            assert torch.equal(plan.gather(id_tensor, -1), id_tensor)
            assert torch.equal(plan.attention_mask, mask_tensor)
            return
    rows = shorten_by_loop(ids, mask, keep, layout)
    if not all(keep):
        assert plan.length == max(map(len, rows))
    new_ids, columns = plan.gather(id_tensor, -1), torch.arange(len(ids[0])).expand(len(ids), -1)
    for row, kept in enumerate(rows):
        padding = plan.length - len(kept)
        assert plan.kept[row].tolist() == [False] * padding + [True] * len(kept)
        assert new_ids[row].tolist() == [-1] * padding + [ids[row][column] for column in kept]
        assert plan.gather(columns, -1)[row].tolist() == [-1] * padding + kept
        assert plan.attention_mask[row].tolist() == [0] * padding + [mask[row][column] for column in kept]


def example(layout="left"):
    ids = torch.tensor([[PAD, PAD, 5, IMAGE, IMAGE, 6], [5, IMAGE, IMAGE, IMAGE, 6, 7]])
    mask = (ids != PAD).long()
    return ids, plan_prompt(ids, mask, IMAGE, torch.tensor([1, 2, 4]), 5, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions(layout):
    ids, plan = example(layout)
    assert plan.gather(ids, PAD).tolist() == [[0, 0, 5, 99, 6], [5, 99, 99, 6, 7]]
    assert plan.removed == 1
    position_ids = torch.arange(6).expand(2, -1)
    assert plan.positions(position_ids, "original").tolist() == [[0, 0, 2, 4, 5], [0, 1, 3, 4, 5]]
    compact = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert plan.positions(position_ids, "compact").tolist() == compact
    three = torch.stack([position_ids, position_ids + 10, position_ids + 20])
    assert plan.positions(three, "original")[2].tolist() == [[0, 0, 22, 24, 25], [20, 21, 23, 24, 25]]
    assert plan.positions(three, "compact").tolist() == [compact] * 3
    four = plan.positions(torch.cat([position_ids[None], three]), "original")
    assert four[0].tolist() == compact  # gaps here would read as packed sequences
    assert four[3].tolist() == [[0, 0, 22, 24, 25], [20, 21, 23, 24, 25]]


def test_column_numbers_move_with_the_suffix():
    _, plan = example("suffix")
    assert shifted_index(torch.tensor([5, 4, -1]), plan).tolist() == [4, 3, 4]
    with pytest.raises(ValueError, match="column 0, which the shortened prompt of 5 columns"):
        shifted_index(torch.tensor([0]), plan)


def test_errors():
    ids = torch.tensor([[5, IMAGE, IMAGE]])
    with pytest.raises(ValueError, match=r"has 2 image placeholders .token id 99. but the images give 3 features"):
        plan_prompt(ids, torch.ones_like(ids), IMAGE, torch.tensor([0]), 3, "left")
    with pytest.raises(ValueError, match="layout='right' is unknown; choose one of left, suffix"):
        plan_prompt(ids, torch.ones_like(ids), IMAGE, torch.tensor([0]), 2, "right")
