"""Derivatives by rotary frequencies: against finite differences, image by image, and through the whole bench."""

import numpy as np
import pytest
import torch

from dualstream.analysis.where.bench import Bench
from dualstream.analysis.where.items import open_pairs
from dualstream.analysis.where.rotary.frequency_sensitivity import (
    FrequencySensitivity,
    frequency_leaves,
    frozen_parameters,
    gradient_by_frequency,
    own_axis_shares,
    sensitivities,
)
from dualstream.analysis.where.rotary.vision_rotation import vision_rotary
from dualstream.modeling import load_model, rope_scaled

ROTARY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def bench():
    model, processor = load_model("tiny-qwen2-vl", device="cpu")
    return Bench(model, processor, open_pairs("scenes", 2), batch_size=4, name="tiny-qwen2-vl")


def two_images(tiny):
    """Inputs with one image per row, and a figure of each row that only its own image moves."""
    inputs = tiny.inputs(["tit", "titt"])

    def contrasts():
        logits = tiny.model(**inputs).logits[:, -1].float()
        return logits[:, 5] - logits[:, 9]

    return contrasts


@pytest.mark.parametrize("family", ROTARY)
def test_derivatives_equal_finite_differences(family, new_tiny_model):
    tiny = new_tiny_model(family)
    contrasts = two_images(tiny)
    rotary = vision_rotary(tiny.model)
    figures, gradient = gradient_by_frequency(rotary, 2, contrasts)
    assert torch.allclose(figures, contrasts(), atol=1e-5)
    assert gradient.abs().max() > 1e-3
    step = 2e-3
    with torch.no_grad(), frequency_leaves(rotary, 2) as table:
        for place in np.ndindex(*gradient.shape[1:]):
            ends = []
            for side in (step, -step):
                table[(slice(None), *place)] += side
                ends.append(contrasts())
                table[(slice(None), *place)] -= side
            slope = (ends[0] - ends[1]) / (2 * step)
            scale = gradient[(slice(None), *place)].abs().max().item()
            assert torch.allclose(gradient[(slice(None), *place)], slope, atol=0.05 * scale + 4e-3), place


@pytest.mark.parametrize("family", ROTARY)
def test_an_image_depends_on_its_own_frequencies_alone(family, new_tiny_model):
    tiny = new_tiny_model(family)
    contrasts = two_images(tiny)
    rotary = vision_rotary(tiny.model)
    _, both = gradient_by_frequency(rotary, 2, contrasts)
    _, first = gradient_by_frequency(rotary, 2, lambda: contrasts()[:1])
    assert bool((first[1] == 0).all())
    assert torch.allclose(first[0], both[0], atol=1e-4)


def test_nothing_is_left_behind(new_tiny_model):
    tiny = new_tiny_model("qwen2_vl")
    contrasts = two_images(tiny)
    frozen = next(iter(tiny.model.parameters()))
    frozen.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in tiny.model.parameters()]
    with torch.no_grad():
        before = contrasts()
    with pytest.raises(RuntimeError, match="inside"), frozen_parameters(tiny.model):
        raise RuntimeError("inside")
    gradient_by_frequency(vision_rotary(tiny.model), 2, contrasts)
    assert [parameter.requires_grad for parameter in tiny.model.parameters()] == asked
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    with torch.no_grad():
        assert torch.equal(contrasts(), before)


def test_rows_hold_derivatives_by_the_logarithm(bench):
    """Scaling one frequency by the same factor in all blocks moves the log-odds as the derivatives say."""
    rows = sensitivities(bench, bench.items[:4])
    factor = 1e-2
    moved = {}
    for sign in (1, -1):
        factors = [[1.0] * 8, [1 + sign * factor] + [1.0] * 7]  # the first frequency of the width
        with rope_scaled(bench.model, {"type": "table", "values": factors, "learned": False}):
            moved[sign] = sensitivities(bench, bench.items[:4])
    for row, up, down in zip(rows, moved[1], moved[-1], strict=True):
        slope = (up["log_odds"] - down["log_odds"]) / (np.log(1 + factor) - np.log(1 - factor))
        by_hand = np.array(row["derivatives"])[:, 8].sum()
        assert abs(slope - by_hand) < 0.05 * abs(by_hand) + 0.03


def test_shares_on_hand_cases():
    import pandas as pd

    rows = [
        {"pair_id": "a", "axis": "horizontal", "derivatives": [[0.0, 1.0, -3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]},
        {"pair_id": "a", "axis": "vertical", "derivatives": [[0.0, 1.0, -3.0, 0.0], [0.0, -1.0, 0.0, 0.0]]},
    ]
    assert own_axis_shares(pd.DataFrame(rows))["share"].tolist() == pytest.approx([0.75, 0.4])


def test_the_experiment_runs_and_states(bench, tmp_path):
    from dualstream.analysis.resumable_rows import ResumableRows

    experiment = FrequencySensitivity()
    rows = ResumableRows(tmp_path / "rows", bench.settings())
    experiment.run(bench, rows)
    table = rows.table()
    assert table.num_rows == 8
    assert [finding.verdict in ("yes", "no", "open") for finding in experiment.summarize(table)] == [True] * 3
    assert len(experiment.tables(table)[0].rows) == 16
    assert experiment.figures(table, tmp_path)[0].stat().st_size > 10_000
    experiment.run(bench, rows)  # nothing is left to do
    assert rows.table().equals(table)


def test_towers_without_rotary_positions_say_so():
    model, processor = load_model("tiny-llava", device="cpu")
    reason = FrequencySensitivity().reason_to_skip(Bench(model, processor, open_pairs("scenes", 2)))
    assert "no vision tower with an axial rotary table" in reason
