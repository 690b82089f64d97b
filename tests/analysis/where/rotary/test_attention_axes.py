"""The axis decomposition on a real tower: against brute force, and its contrasts on made-up rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualstream.analysis.where.bench import Bench
from dualstream.analysis.where.items import open_pairs
from dualstream.analysis.where.rotary.attention_axes import AttentionAxes, logit_parts, published_share
from dualstream.analysis.where.rotary.axis_contrasts import (
    SCALED,
    STOCK,
    contrast_shares,
    contrasts,
    frequency_shares,
    head_contrasts,
    odd_shares,
)
from dualstream.analysis.where.rotary.rotary_algebra import pair_parts, rotated
from dualstream.analysis.where.rotary.vision_rotation import (
    queries_and_keys,
    raster_places,
    tower_positions,
    vision_rotary,
)
from dualstream.modeling import load_model, rope_scaled


@pytest.fixture(scope="module")
def bench():
    model, processor = load_model("tiny-qwen2-vl", device="cpu")
    return Bench(model, processor, open_pairs("scenes", 2), batch_size=8, name="tiny-qwen2-vl")


@pytest.mark.parametrize("scaling", ["poly:0", "poly:99:2:w"])
@torch.no_grad()
def test_parts_add_up_to_the_logits_between_the_objects(bench, scaling):
    """Even and odd parts over both axes give the mean logit of the two objects' patches, found by their pixels."""
    items = bench.items[:3]
    rotary_logits, kept = {}, []
    with rope_scaled(bench.model, scaling):
        rows = pd.DataFrame(logit_parts(bench, items))
        rotary = vision_rotary(bench.model)

        def visit(block, queries, keys, sides):
            cos, sin = (side[:, None] for side in sides)
            products = torch.einsum("nhd,mhd->hnm", rotated(queries, cos, sin), rotated(keys, cos, sin))
            rotary_logits[block] = products * rotary.attentions[block].scaling

        inputs = bench.inputs(items)
        with tower_positions(rotary, kept), queries_and_keys(rotary, visit):
            bench.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    places = raster_places(kept[0])
    for number, item in enumerate(items):
        grid = places[number]
        sets = []
        for role in ("subject", "reference"):
            tokens = bench.tokens(item, role)
            side = bench.geometry(bench.size(item)).grids[0][1]
            cells = [(2 * (t // side) + i, 2 * (t % side) + j) for t in tokens for i in (0, 1) for j in (0, 1)]
            sets.append(torch.stack([grid[cell] for cell in cells]))
        for (block, head), group in rows[rows["item"] == item.name].groupby(["block", "head"]):
            for direction, (own, other) in (("subject → reference", sets), ("reference → subject", sets[::-1])):
                row = group[group["direction"] == direction].iloc[0]
                expected = rotary_logits[block][head][own][:, other].mean()
                assert sum(row["even"]) + sum(row["odd"]) == pytest.approx(float(expected), abs=2e-4)


@torch.no_grad()
def test_the_published_measure_by_hand(bench):
    """One softmax over both axes' head-mean logits of every row, from the whole map."""
    rotary, kept, seen = vision_rotary(bench.model), [], {}

    def visit(block, queries, keys, sides):
        seen[block] = (queries, keys, sides)

    inputs = bench.inputs(bench.items[:1])
    with tower_positions(rotary, kept), queries_and_keys(rotary, visit):
        bench.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    queries, keys, sides = seen[1]
    image = raster_places(kept[0])[0].flatten()
    own, other = image[:5], image[40:47]
    share = published_share(rotary, queries, keys, sides, own, other, image, 0.5)
    cos, sin = (side[:, None] for side in sides)
    turned = rotated(queries, cos, sin), rotated(keys, cos, sin)
    height = [channel for channel in range(32) if channel % 16 < 8]
    width = [channel for channel in range(32) if channel % 16 >= 8]
    maps = [0.5 * torch.einsum("nhd,mhd->hnm", *(x[..., part] for x in turned)).mean(0) for part in (height, width)]
    whole = torch.cat(maps, -1).softmax(-1)
    first, second = whole[:, : len(image)], whole[:, len(image) :]
    expected = second[own][:, other].mean() / (first[own][:, other].mean() + second[own][:, other].mean())
    assert share == pytest.approx(float(expected), abs=1e-5)


def made_up(odd_width=1.0, even=0.5, other=0.0, scale=1.0):
    """Rows in which left and right differ in the odd width part alone, above and below in the odd height part."""
    rows = []
    for scaling in (STOCK, SCALED):
        for pair in ("a", "b"):
            for relation, axis, sign in (
                ("left", "horizontal", 1),
                ("right", "horizontal", -1),
                ("above", "vertical", 1),
                ("below", "vertical", -1),
            ):
                own = [sign * odd_width, 0.0]
                rest = [sign * other, 0.0]
                odd = (rest + own) if axis == "horizontal" else (own + rest)
                factor = scale if scaling == SCALED else 1.0
                rows.append(
                    {
                        "scaling": scaling,
                        "pair_id": pair,
                        "item": f"{pair}-{relation}",
                        "relation": relation,
                        "axis": axis,
                        "block": 0,
                        "head": 0,
                        "direction": "subject → reference",
                        "published": 0.5,
                        "even": [even, 0.0, even, even],
                        "odd": [factor * x for x in odd],
                        "even_square": [even**2, even**2],
                        "odd_square": [factor * odd_width**2] * 2,
                    }
                )
    return pd.DataFrame(rows)


def test_contrasts_on_hand_cases():
    frame = made_up()
    table = contrasts(frame, STOCK)
    horizontal = table[table["axis"] == "horizontal"]
    assert horizontal["odd_w"].tolist() == [1.0, 1.0] and horizontal["odd_h"].tolist() == [0.0, 0.0]
    assert horizontal["even_w"].tolist() == [0.0, 0.0]
    vertical = table[table["axis"] == "vertical"]
    assert vertical["odd_h"].tolist() == [1.0, 1.0] and vertical["odd_w"].tolist() == [0.0, 0.0]
    assert contrast_shares(frame, STOCK)[["axis", "parity"]].to_numpy().tolist() == [[1.0, 1.0]] * 4
    assert contrast_shares(made_up(other=1.0), STOCK)["axis"].tolist() == [0.5] * 4
    found = head_contrasts(frame)
    assert found["horizontal", "w", 0, 0, "subject → reference"][0].tolist() == [1.0, 1.0]
    assert found["horizontal", "h", 0, 0, "subject → reference"][0].tolist() == [0.0, 0.0]


def test_shares_on_hand_cases():
    shares = odd_shares(made_up(even=0.5, odd_width=1.5), STOCK)
    assert shares["expected"].tolist() == pytest.approx([0.75] * 8)
    bands = frequency_shares(made_up(even=0.5, odd_width=1.5), STOCK)
    assert bands["high"].tolist() == pytest.approx([0.75] * 8)
    assert bands["low"].dropna().tolist() == pytest.approx([0.0] * 4)  # the height's low frequency has no part at all


def test_the_experiment_runs_and_states(bench, tmp_path):
    from dualstream.analysis.resumable_rows import ResumableRows

    experiment = AttentionAxes()
    rows = ResumableRows(tmp_path / "rows", bench.settings() | experiment.settings())
    experiment.run(bench, rows)
    table = rows.table()
    assert table.num_rows == 2 * 8 * 4 * 3 * 2  # scalings, pictures, blocks, heads, directions
    assert len(experiment.summarize(table)) == 5
    assert [shown.title for shown in experiment.tables(table)]
    assert all(path.stat().st_size > 8_000 for path in experiment.figures(table, tmp_path))
    first = (tmp_path / "rows" / "rows").glob("*.parquet")
    next(first).unlink()
    experiment.run(bench, rows)
    assert rows.table().equals(table)


def test_no_map_of_all_patches_is_kept(bench):
    """Nothing as large as one map of all patches of an image with all others is ever made by the decomposition."""
    rotary = vision_rotary(bench.model)
    patches, heads, pairs = 4_000, 2, len(rotary.column)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(patches, heads, 2 * pairs, generator=generator) for _ in range(2))
    angles = torch.rand(patches, pairs, generator=generator)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest.append(output.numel())
            return output

    with Watch():
        sides = (angles.cos(), angles.sin())
        parts = pair_parts(queries, keys, sides, sides, rotary.column, 1.0)
    assert max(largest) < patches**2 / 10
    assert np.isfinite(parts.even_square.numpy()).all()
