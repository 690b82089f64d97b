import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.benchmarks.forced_map import DECODERS, build_decoder, forced, forced_ids, kept_cells
from dualstream.benchmarks.shapes import build_model
from dualstream.measuring import count_work
from dualstream.modeling import CompressionConfig, run_length_plan

GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@given(GRIDS, st.floats(0, 1))
@settings(deadline=None)
def test_forced_readings_make_exactly_the_wanted_runs(grids, reduction):
    blocks = torch.tensor(grids)
    plan = run_length_plan(forced_ids(blocks, reduction)[:, None], blocks, CompressionConfig("rle"))
    wanted = [min(max(round((1 - reduction) * height * width), height), height * width) for height, width in grids]
    assert plan.kept_per_block.tolist() == kept_cells(blocks, reduction).tolist()
    assert all(abs(a - b) <= 1 for a, b in zip(wanted, plan.kept_per_block.tolist(), strict=True))  # halves round
    assert plan.segment.min() >= 0


def test_runs_are_spread_over_rows():
    blocks = torch.tensor([[24, 24]])
    plan = run_length_plan(forced_ids(blocks, 0.49)[:, None], blocks, CompressionConfig("rle"))
    per_row = torch.bincount(plan.anchor // 24, minlength=24)
    assert plan.num_kept == 294 and int(per_row.max() - per_row.min()) <= 1


@pytest.mark.parametrize("kind", DECODERS)
def test_forced_decoder_does_the_work_of_the_real_one(kind):
    model = build_model("tiny", 1, 1)
    decoder = build_decoder(kind, model)
    reader = forced(decoder, torch.tensor([[4, 6]]), 0.5)
    features, head = torch.randn(24, 128), model.get_output_embeddings().weight
    real, replaced = (count_work(lambda d=d: d.top_k(features, 1, head)) for d in (decoder, reader))
    assert replaced.flops == real.flops == 2 * 24 * decoder.multiply_adds
    assert replaced.waits == real.waits == 0
    assert replaced.operations - real.operations <= 3  # compare, view and choose
    assert torch.equal(reader.top_k(features, 1, head), forced_ids(torch.tensor([[4, 6]]), 0.5)[:, None])
    assert type(decoder) is not type(reader) and decoder.own_parameter is reader.own_parameter


def test_unknown_kind_and_rate_are_refused():
    with pytest.raises(ValueError, match="decoder='cubic'"):
        build_decoder("cubic", build_model("tiny", 1, 1))
    with pytest.raises(ValueError, match=r"reduction=1\.2"):
        kept_cells(torch.tensor([[2, 2]]), 1.2)
