"""Figures of a decoder: under every key, paired, and against the map of another picture."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.eval.decoder_metrics import DecoderReadings, agreement_figures, estimate_figures, stretched_cells


def test_figures_by_text_by_id_and_by_class():
    """Ids 0 and 1 share a text; 2 and 3 share a class only."""
    text_class, classes = torch.tensor([0, 0, 2, 3]), torch.tensor([0, 0, 1, 1])
    teacher = torch.tensor([0, 1, 2, 3])[:, None]
    student = torch.tensor([1, 1, 3, 3])[:, None]
    readings = DecoderReadings({}, teacher, torch.tensor([[1, 4]]), torch.tensor([0]))
    figures = agreement_figures(readings, student, torch.zeros(4, dtype=torch.bool), text_class, classes)
    assert (figures["top1"], figures["top1_by_id"], figures["top1_by_class"]) == ([0.75], [0.5], [1.0])
    assert figures["boundary_f1"] == pytest.approx([2 / 3]) and figures["boundary_f1_by_class"] == [1.0]
    assert figures["boundary_f1_by_id"] == pytest.approx([2 / (3 + 1)])
    assert "meaningless_f1" in figures and "meaningless_f1_by_id" not in figures
    plain = agreement_figures(readings, student, torch.zeros(4, dtype=torch.bool), text_class)
    assert not any("class" in name for name in plain)


def test_gains_are_paired():
    """The two arms share what differs between images, so their difference is known far better than either."""
    noise = np.random.default_rng(0).normal(0.5, 0.2, 200)
    estimates = estimate_figures({"top1": noise + 0.01, "extra": noise}, {"top1": noise})
    assert estimates["top1_gain"].value == pytest.approx(0.01)
    assert estimates["top1_gain"].low == pytest.approx(0.01) and estimates["top1"].high - estimates["top1"].low > 0.03
    assert "extra_gain" not in estimates


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4))
def test_a_stretched_grid_keeps_relative_places(sizes):
    source, target = sizes[:2], sizes[2:]
    cells = stretched_cells(list(source), list(target)).reshape(target)
    for row in range(target[0]):
        for column in range(target[1]):
            expected = (int((row + 0.5) * source[0] / target[0]), int((column + 0.5) * source[1] / target[1]))
            assert divmod(int(cells[row, column]), source[1]) == expected
    assert torch.equal(stretched_cells(list(source), list(source)), torch.arange(source[0] * source[1]))


def test_the_control_reads_every_image_by_the_next_ones_map():
    teacher = torch.arange(4 + 4 + 2)[:, None].expand(-1, 2)
    readings = DecoderReadings({}, teacher, torch.tensor([[2, 2], [1, 4], [1, 2]]), torch.tensor([0, 0, 1]))
    assert readings.other_picture()[:, 0].tolist() == [8, 9, 8, 9, 8, 8, 9, 9, 2, 3]
