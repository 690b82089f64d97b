"""Rotary attention as algebra, against brute force over all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from dualstream.analysis.where.rotary.rotary_algebra import as_complex, pair_parts, rotated

PAIRS, HEADS = 8, 3
GROUPS = torch.tensor([0] * 4 + [1] * 4)  # the first half of the pairs turns with the row, the second with the column
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)


def angles_of(positions):
    """(n, PAIRS) angles of (n, 2) rows and columns."""
    return torch.cat([positions[:, :1] * FREQUENCIES, positions[:, 1:] * FREQUENCIES], dim=-1)


def sides(positions):
    angles = angles_of(positions.double())
    return angles.cos(), angles.sin()


def draw(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(size, HEADS, 2 * PAIRS, dtype=torch.float64, generator=generator) for size in (n, m))
    places = [torch.randint(0, 40, (size, 2), generator=generator) for size in (n, m)]
    return queries, keys, *places


def brute_force(queries, keys, query_places, key_places, scaling):
    """Even and odd part of every pair of tokens, (n, m, heads, PAIRS), term by term from the definition."""
    product = as_complex(queries)[:, None] * as_complex(keys).conj()[None]
    difference = angles_of(query_places.double())[:, None] - angles_of(key_places.double())[None]
    difference = difference[:, :, None]
    return scaling * product.real * difference.cos(), -scaling * product.imag * difference.sin()


def test_rotation_is_complex_multiplication():
    """``rotate_half`` and transformers' own function turn as exp(i phi) does."""
    queries, _, places, _ = draw(0, 5, 1)
    cos, sin = sides(places)
    doubled = [torch.cat([part, part], -1) for part in (cos, sin)]
    stock, _ = apply_rotary_pos_emb_vision(queries, queries, *doubled)
    own = rotated(queries, cos[:, None], sin[:, None])
    assert torch.allclose(own, stock.double(), atol=1e-6)
    turned = as_complex(queries) * torch.exp(1j * angles_of(places.double()))[:, None]
    assert torch.allclose(as_complex(own), turned, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), m=st.integers(1, 6))
def test_parts_equal_brute_force_over_all_pairs(seed, n, m):
    queries, keys, query_places, key_places = draw(seed, n, m)
    parts = pair_parts(queries, keys, sides(query_places), sides(key_places), GROUPS, 0.25)
    even, odd = brute_force(queries, keys, query_places, key_places, 0.25)
    assert torch.allclose(parts.even, even.mean((0, 1)), atol=1e-12)
    assert torch.allclose(parts.odd, odd.mean((0, 1)), atol=1e-12)
    for group in (0, 1):
        for own, all_pairs in ((parts.even_square, even), (parts.odd_square, odd)):
            expected = all_pairs[..., group == GROUPS].sum(-1).square().mean((0, 1))
            assert torch.allclose(own[:, group], expected, atol=1e-11)


def test_parts_add_up_to_the_logit():
    """Over axes and both parts, exactly the mean logit that the rotated queries and keys give."""
    queries, keys, query_places, key_places = draw(1, 7, 4)
    (cos_q, sin_q), (cos_k, sin_k) = sides(query_places), sides(key_places)
    parts = pair_parts(queries, keys, (cos_q, sin_q), (cos_k, sin_k), GROUPS, 0.25)
    turned = rotated(queries, cos_q[:, None], sin_q[:, None]), rotated(keys, cos_k[:, None], sin_k[:, None])
    logits = 0.25 * torch.einsum("nhd,mhd->nmh", *turned)
    assert torch.allclose((parts.even + parts.odd).sum(-1), logits.mean((0, 1)), atol=1e-12)


def test_mirroring_flips_only_the_odd_part_of_the_width():
    """The same contents with A and B swapped left and right: only the odd width part changes, to its negative."""
    queries, keys, query_places, key_places = draw(2, 6, 5)
    mirrored = [places * torch.tensor([1, -1]) for places in (query_places, key_places)]
    parts = pair_parts(queries, keys, sides(query_places), sides(key_places), GROUPS, 1.0)
    flipped = pair_parts(queries, keys, sides(mirrored[0]), sides(mirrored[1]), GROUPS, 1.0)
    width = GROUPS == 1
    assert torch.allclose(flipped.even, parts.even, atol=1e-12)
    assert torch.allclose(flipped.odd[:, ~width], parts.odd[:, ~width], atol=1e-12)
    assert torch.allclose(flipped.odd[:, width], -parts.odd[:, width], atol=1e-12)
    assert parts.odd[:, width].abs().max() > 0.01
    assert torch.allclose(flipped.odd_square, parts.odd_square, atol=1e-12)


def test_without_displacement_nothing_is_odd():
    queries, keys, places, _ = draw(3, 1, 1)
    parts = pair_parts(queries, keys, sides(places), sides(places), GROUPS, 1.0)
    assert parts.odd.abs().max() < 1e-12
    assert parts.odd_square.abs().max() < 1e-12


def test_no_tokens_is_an_error():
    queries, keys, places, others = draw(4, 2, 2)
    with pytest.raises(ValueError, match="0 and 2"):
        pair_parts(queries[:0], keys, sides(places[:0]), sides(others), GROUPS, 1.0)
