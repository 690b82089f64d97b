"""The lens against its closed form, and figures of accuracy on rows that are known."""

import pyarrow as pa
import pytest
import torch

from dualstream.analysis.where.vision_depth import (
    PLAIN,
    PRESENCE,
    SPATIAL,
    TUNED,
    VisionDepth,
    _Fit,
    accuracy,
    both_right,
    difference,
)


def test_the_lens_finds_an_affine_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 12, generator=generator) + 3
    weight, shift = torch.randn(12, 12, generator=generator), torch.randn(12, generator=generator)
    fit = _Fit()
    for part in x.split(700):
        fit.add(part, part @ weight + shift)
    fresh = torch.randn(2, 7, 12, generator=generator)
    error = (fit.lens()(fresh) - (fresh @ weight + shift)).abs().max()
    assert error < 0.1
    assert fit.count == 5000 and fit.xx.shape == (12, 12)  # sums, not states


def rows_of(right):
    """`right` maps (question, lens, depth) to the share of the four pictures of every pair that are right."""
    rows = []
    for (question, lens, depth), share in right.items():
        for pair in range(10):
            for number, axis in enumerate(("horizontal", "horizontal", "vertical", "vertical")):
                correct = number < round(4 * share)
                rows.append(
                    {
                        "pair_id": f"p{pair}",
                        "axis": axis,
                        "question": question,
                        "lens": lens,
                        "depth": depth,
                        "correct": correct,
                        "best": correct,
                    }
                )
    return rows


ARMS = {
    (SPATIAL, PLAIN, 0): 0.5,
    (SPATIAL, PLAIN, 1): 0.5,
    (SPATIAL, PLAIN, 2): 1.0,
    (SPATIAL, TUNED, 0): 0.5,
    (SPATIAL, TUNED, 1): 0.75,
    (PRESENCE, PLAIN, 0): 0.5,
    (PRESENCE, PLAIN, 1): 1.0,
    (PRESENCE, PLAIN, 2): 1.0,
    (PRESENCE, TUNED, 0): 0.5,
    (PRESENCE, TUNED, 1): 1.0,
}


def test_figures_of_known_answers():
    rows = rows_of(ARMS)
    assert accuracy(rows, SPATIAL, TUNED, 1).value == 0.75 and accuracy(rows, SPATIAL, PLAIN, 2).n == 10
    assert both_right(rows, TUNED, 1).value == 0.5  # of the two axes one is right in both pictures
    gain = difference(rows, SPATIAL, (PLAIN, 2), (PLAIN, 1))
    assert gain.value == pytest.approx(0.5) and gain.low > 0
    none = difference(rows, PRESENCE, (PLAIN, 2), (PLAIN, 1))
    assert none.value == 0 and none.low < 0 < none.high  # agreement does not make the interval a point


def test_statements_follow_their_rules(tmp_path):
    table, experiment = pa.Table.from_pylist(rows_of(ARMS)), VisionDepth()
    findings = experiment.summarize(table)
    verdicts = [finding.verdict for finding in findings]
    assert verdicts == ["yes", "open", "open", "yes", "yes", "yes"]
    assert "first 1 blocks and a lens" in findings[3].statement
    (shown,) = experiment.tables(table)
    assert [row[:2] for row in shown.rows] == [(0, PLAIN), (0, TUNED), (1, PLAIN), (1, TUNED), (2, PLAIN)]
    (path,) = experiment.figures(table, tmp_path)
    assert path.stat().st_size > 5000
