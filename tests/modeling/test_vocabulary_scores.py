"""Reading ids alone: the rows of the float32 scores, also where bfloat16 products name the candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.measuring import count_work
from dualstream.modeling import vocabulary_scores
from dualstream.modeling.vocabulary_scores import best_tokens, float32_product, top_k_tokens


def matrices(cells, rows, width, spread, seed):
    """Features and rows in bfloat16; a small spread makes all rows of the matrix alike, so that scores nearly tie."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(cells, width, generator=generator).bfloat16()
    common = torch.randn(1, width, generator=generator)
    weight = (common + spread * torch.randn(rows, width, generator=generator)).bfloat16()
    return features, weight


@settings(max_examples=150, deadline=None)
@given(
    cells=st.integers(0, 9),
    rows=st.integers(1, 120),
    width=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0]),
    k=st.integers(1, 3),
    chunk_size=st.integers(1, 130),
    seed=st.integers(0, 10**6),
)
def test_candidates_are_settled_as_in_float32(cells, rows, width, spread, k, chunk_size, seed):
    features, weight = matrices(cells, rows, width, spread, seed)
    k = min(k, rows)
    ids = best_tokens(features, weight, k, chunk_size=chunk_size)
    exact = features.double() @ weight.double().T
    best = exact.topk(k).values
    chosen = exact.gather(1, ids)
    # Equal scores may swap; beside them only sums in another order differ.
    sums = (features.double().abs() @ weight.double().abs().T).amax(1, keepdim=True) if rows else best
    assert bool(((best - chosen).abs() <= 1e-6 * sums).all())
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(ids, best_tokens(features.clone(), weight, k, chunk_size=chunk_size))


@pytest.mark.parametrize("k", [1, 2])
def test_ids_are_those_of_the_float32_scores(k):
    features, weight = matrices(300, 5000, 64, 1.0, seed=0)
    expected = (features.float() @ weight.float().T).topk(k).indices
    for cast in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(best_tokens(features.to(cast), weight.to(cast), k), expected)
        assert torch.equal(top_k_tokens(features.to(cast), weight.to(cast), k)[0], expected)
    rounded = (features @ weight.T).float().topk(k).indices
    assert not torch.equal(rounded, expected)  # what taking the bfloat16 product at its word would give


def test_the_bound_covers_what_rounding_does_to_two_scores():
    features, weight = matrices(500, 2000, 64, 1.0, seed=2)
    exact = features.double() @ weight.double().T
    moved = ((features @ weight.T).double() - exact).abs() / exact.abs()
    worst = moved[exact.abs() > 1].max()
    assert 0.9 * 2**-8 < worst <= vocabulary_scores.ROUNDING / 3


def test_only_what_rounding_leaves_open_is_scored_again(monkeypatch):
    features, weight = matrices(50, 400, 64, 1.0, seed=1)
    settled = []
    stock = vocabulary_scores._best_rows
    monkeypatch.setattr(vocabulary_scores, "_best_rows", lambda x, *rest: settled.append(len(x)) or stock(x, *rest))
    best_tokens(features, weight)
    assert sum(settled) <= 1
    alike = weight[:1].expand(400, -1)  # no candidate stands out: everything is scored in float32
    best_tokens(features, alike)
    assert settled[-1] == 50


def test_ties_go_to_the_first_slice():
    weight = torch.ones(10, 4)
    assert best_tokens(torch.ones(3, 4), weight, chunk_size=3).tolist() == [[0]] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_multiplied_as_they_are_where_the_result_can_be_float32(dtype):
    features, rows = torch.empty(6, 8, dtype=dtype, device="meta"), torch.empty(5, 8, dtype=dtype, device="meta")
    product = float32_product(features, rows)
    assert product.dtype == torch.float32 and product.shape == (6, 5)
    counts = count_work(lambda: float32_product(features, rows), flops=False)
    assert counts.by_name["mm"] == 1 and counts.by_name["_to_copy"] == 0
