"""E1 and E2 on real architectures: the learned table, rolled pictures, the linear reader of places."""

import numpy as np
import pytest
import torch
from PIL import Image

from dualstream.analysis.where.geometry.position_geometry import (
    PositionGeometry,
    field_rows,
    learned_cells,
    table_projections,
    token_table,
)
from dualstream.analysis.where.geometry.position_reading import CellReader, blocks_of_grid, rolled
from dualstream.analysis.where.states import CONNECTOR, Place

PLACE = Place(0, CONNECTOR, 0)


def test_tables_of_the_families(tiny_model):
    llava, _ = tiny_model("llava")
    weight = next(value for name, value in llava.named_parameters() if name.endswith("position_embedding.weight"))
    table = learned_cells(llava)
    assert table.shape == (4, 4, 32)
    np.testing.assert_allclose(table[1, 2], weight[1 + 4 + 2].detach().numpy(), rtol=1e-6)  # behind the class token
    assert learned_cells(tiny_model("qwen2_vl").model) is None
    assert learned_cells(tiny_model("qwen2_5_vl").model) is None
    assert learned_cells(tiny_model("qwen3_vl").model).shape == (8, 8, 32)
    intern = tiny_model("internvl").model
    merged = token_table(intern, (4, 4))
    np.testing.assert_allclose(merged[1, 2], learned_cells(intern)[2:4, 4:6].mean((0, 1)))
    assert token_table(intern, (3, 3)) is None


def test_projections_of_states_that_are_the_table():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 6, 64))
    found = table_projections(3 * table + 20 * rng.normal(size=64), table, 0)
    assert found["cosine"] == pytest.approx(1, abs=1e-9)
    assert abs(found["cosine null"]) < 0.3
    unit = table_projections(table, table, 0)  # <p, p> / |p| is the length of p
    assert unit["projection"] == pytest.approx(np.linalg.norm(table, axis=-1).mean())


def test_rolling_keeps_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    moved = np.asarray(rolled(Image.fromarray(pixels), np.random.default_rng(3)))
    assert not np.array_equal(moved, pixels)
    assert any(
        np.array_equal(np.roll(pixels, (down, right), (0, 1)), moved) for down in range(9) for right in range(14)
    )


def test_only_blocks_of_the_grid_are_taken():
    states = {PLACE: torch.arange(2 * 3 + 4 + 6, dtype=torch.float32)[:, None].repeat(1, 2)}
    found = list(blocks_of_grid([(2, 3), (2, 2), (2, 3)], (2, 3), states))
    assert [block[PLACE][0, 0, 0] for block in found] == [0, 10]
    assert found[1][PLACE].shape == (2, 3, 2) and found[1][PLACE][1, 2, 0] == 15


def test_the_reader_reads_places_and_its_control_does_not():
    rng = np.random.default_rng(0)
    row, col = np.mgrid[:6, :8]
    axes = rng.normal(size=(2, 30))

    def picture():
        return (row[..., None] * axes[0] + col[..., None] * axes[1] + 0.5 * rng.normal(size=(6, 8, 30))).astype("f4")

    reader = CellReader((6, 8), seed=0)
    for _ in range(12):
        reader.add(picture(), most=20)
    reader.fit()
    found = reader.measure(picture())
    assert found["row"] > 0.9 and found["col"] > 0.9 and found["share"] > 0.9
    assert found["row null"] < 0.3 and found["col null"] < 0.3 and found["share null"] < 0.1
    content = CellReader((6, 8), seed=0)
    for _ in range(12):
        content.add(rng.normal(size=(6, 8, 30)).astype("f4"), most=20)
    content.fit()
    assert content.measure(rng.normal(size=(6, 8, 30)).astype("f4"))["row"] < 0.2


def test_rows_of_a_field_carry_value_interval_and_null():
    field = np.random.default_rng(0).normal(size=(6, 6, 50))
    rows = list(field_rows(field, PLACE, [1, 2], 20, 0))
    assert len(rows) == 2 * 5
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"] and row["null_low"] <= row["null_value"] <= row["null_high"]
        # a field without order lies within the range of its shuffled versions, give or take
        assert abs(row["value"] - row["null_value"]) < 0.35


def test_options_are_refused():
    with pytest.raises(ValueError, match="position_geometry has no options step"):
        PositionGeometry(step=3)
